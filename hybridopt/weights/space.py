"""Weight space: the only room, besides the base optimizer, that writes parameters.

A few tensors per parameter, kept in the base's own ``state[p]`` so that they follow
the parameters through every checkpoint: the *anchor* (weights after the last real step,
what a rollback restores), the *step* s (the base's last displacement), the *lag* v =
theta - ema(theta), and, where drift moves fit into memory, the *window* D (the EMA's
displacement since the window began) and the *drift* d (that of the window before). A
predicted move shifts weights and EMA alike, so none of them changes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.protocols import Ops
from hybridopt.types import DRIFT, Extent
from hybridopt.weights import directions
from hybridopt.weights.advancing import (
    advance,
    advance_low,
    advance_moved,
    clear,
    copy_across,
    restart,
    turn,
)
from hybridopt.weights.averages import along_drift
from hybridopt.weights.buckets import ANCHOR, KEYS, Bucket, BucketTable
from hybridopt.weights.lag import DozingLag, averaged
from hybridopt.weights.local import local
from hybridopt.weights.reading import PendingReading
from hybridopt.weights.tensors import HybridTensors

__all__ = ["ANCHOR", "KEYS", "WeightSpace"]


class WeightSpace:
    """Reads and moves the parameters of one base optimizer.

    Parameters are looked up in ``base.param_groups`` at every call and state by
    parameter: frameworks replace tensors inside existing groups.
    """

    def __init__(
        self, base: torch.optim.Optimizer, config: HybridConfig, ops: Ops
    ) -> None:
        self.base = base
        self.ops = ops
        self.beta = config.drift.beta
        self.low_memory = config.memory == "low"
        self._tensors = HybridTensors(base, config)
        self.anchored = False
        """Whether the anchor holds the weights that the last real step left."""
        self.moved = False
        """Whether a predicted move was made since the anchor was set."""
        self.stepped = False
        """Whether s is the displacement of the last real step."""
        self.held = False
        """Whether the last real step was ``hold``: only the anchor is known of it."""
        self._owed = False
        """Whether the anchor is older than the weights that it should hold; only with
        low memory, where it is taken when a move first needs it."""
        self._copied: torch.cuda.Event | None = None
        """When the anchor is complete in host memory."""
        self._slopes: list[tuple[list[int], Tensor]] = []
        self._lag = DozingLag(self.beta)
        self._listed: list[Tensor] | None = None
        self._table = BucketTable(base)

    def refresh(self) -> None:
        """Look parameters, gradients and state up anew; call once per step."""
        self._listed = None
        self._table.refresh()

    # -- what there is -------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Every trainable parameter in group order; L is the length of this list.

        Not to be changed: it is kept until the next ``refresh``.
        """
        if self._listed is None:
            groups = self.base.param_groups
            self._listed = [p for g in groups for p in g["params"] if p.requires_grad]
        return self._listed

    @property
    def ready(self) -> bool:
        """Whether some parameter has its hybrid tensors."""
        return any(b.tracked for b in self._all())

    @property
    def drifts(self) -> bool:
        """Whether drift moves are made; see ``HybridTensors.drifts``."""
        return self._tensors.drifts(self.parameters())

    def extra_bytes(self) -> int:
        """Bytes that the hybrid tensors of this rank take on the device."""
        return self._tensors.extra_bytes(self.parameters())

    def allocate(self) -> None:
        """Give every parameter its hybrid tensors, after the base has filled its state.

        Bases test ``len(state[p]) == 0`` to initialize, so this never comes first.
        """
        self._wake()
        self._tensors.allocate(self.parameters())
        self._table.forget()

    def restore(self) -> None:
        """Mend what ``load_state_dict`` left; see ``HybridTensors.restore``."""
        mended = self._tensors.restore(self.parameters())
        self._table.forget()
        if mended and self._lag.averages:
            # What lags hold depends on their precision: the EMA starts anew.
            self._clear()

    def complete(self) -> bool:
        """Whether every parameter that has a gradient has its hybrid tensors."""
        return not any(b.gradients and not b.tracked for b in self._all())

    def forget(self) -> None:
        """Start over from the weights as they are: no displacement, no drift."""
        self.allocate()
        self._clear(drifts=True)
        self.stepped = self.held = self.moved = self._owed = False

    # -- one real step -------------------------------------------------------------

    def observe(
        self, loss: Tensor | float | None, extent: Extent = Extent.WHOLE
    ) -> PendingReading:
        """Measure gradient against basis, on the device; ``wait`` brings the numbers.

        Reads everything, writes nothing.

        Args:
            extent: What is not measured of it is zero in the reading.
        """
        buckets = self._all()
        reading = PendingReading(sum(len(b.rows) for b in buckets), loss)
        for bucket in buckets:
            if not bucket.gradients:
                continue
            newcomer = not bucket.tracked
            if extent is Extent.NORM or (extent.along_drift and newcomer):
                values = self.ops.observe(bucket.gradients, [])
                reading.add_statistics(bucket.rows, values)
            elif extent.along_drift:
                values = along_drift(self.base, self.ops, bucket)
                reading.add_statistics(bucket.rows, values, DRIFT)
            else:
                values = self.ops.observe(
                    bucket.gradients, bucket.basis, bucket.basis_sq
                )
                if bucket.on_host:
                    bucket.remember(values)
                reading.add_statistics(bucket.rows, values)
        for rows, slopes in self._slopes:
            reading.add_slopes(rows, slopes)
        return reading

    def before_base(self) -> None:
        """Remember the weights that the base is about to move."""
        self._wake()
        for bucket in self.tracked_buckets():
            if self.low_memory:
                self.ops.copy(bucket.parameters, bucket.steps)
            elif not self.anchored or self.moved:
                self.ops.copy(bucket.parameters, bucket.anchors)
        self.moved = False

    def after_base(self, gains: Tensor | None = None) -> bool:
        """Take in the base's step: s, v and the anchor.

        Args:
            gains: (L,) of a move along s that nobody will take back. Where the backend
                has a kernel for it, it is made in the same pass, and the anchor is then
                the weight behind it.

        Returns:
            Whether that move was made.
        """
        buckets = self.tracked_buckets()
        made = None
        if gains is not None and not self.low_memory:
            made = advance_moved(self.ops, buckets, self.beta, gains)
        self._slopes = [] if made is None else [(buckets[0].rows, made)]
        for bucket in buckets if made is None else ():
            if not bucket.gradients:
                # Nothing moved these; they keep no displacement.
                torch._foreach_zero_(bucket.steps)
                bucket.step_sq = None
                if not self.low_memory:
                    self.ops.copy(bucket.parameters, bucket.anchors)
                continue
            if self.low_memory:
                slopes = advance_low(self.ops, bucket)
            else:
                slopes = advance(self.ops, bucket, self.beta)
            self._slopes.append((bucket.rows, slopes))
        self.anchored = True
        self.stepped = True
        self.held = self.moved = False
        self._owed = self.low_memory
        return made is not None

    def hold(self) -> None:
        """Instead of ``before_base`` and ``after_base``, where a secant move will undo
        the base's step: the anchor alone. The EMA comes along: no lag, empty window.
        """
        buckets = self.tracked_buckets()
        if not self.held:
            self._clear()
        for bucket in () if self.low_memory else buckets:
            self.ops.copy(bucket.parameters, bucket.anchors)
        self.anchored = self.held = True
        self.stepped = self.moved = False
        self._owed = self.low_memory

    # -- one real step asleep --------------------------------------------------------

    @property
    def can_doze(self) -> bool:
        """Whether no move has to be taken back and the anchor starts the lag's way."""
        return not self.moved and (self.anchored or self._lag.dozes)

    def doze(self, *, windows: bool, due: bool = False) -> None:
        """In place of ``before_base`` and ``after_base``: the EMA alone, at times.

        Args:
            windows: Whether the drift window goes on with it.
            due: Whether both have to be up to date behind this step.
        """
        if windows is not self._lag.windows:
            self._wake()
        self._slopes = []
        self.anchored = self.stepped = self.held = False
        self._lag.windows = windows
        self._lag.steps += 1
        if due:
            self._wake()
        elif self._lag.due:
            self._lag.catch_up(self.tracked_buckets(), self.ops)
            self.anchored = not self._lag.averages

    def _wake(self) -> None:
        """Lag, window and anchor as of now, if they are not."""
        if self._lag.dozes:
            self._lag.wake(self.tracked_buckets(), self.ops)
            self.anchored = True
            self._owed = self.low_memory

    def turn_window(self) -> None:
        """The window's displacement becomes the drift: d <- D, D <- 0."""
        turn(self.tracked_buckets())

    def restart_window(self) -> None:
        """Begin a window here, without a move: D <- 0."""
        restart(self.tracked_buckets())

    # -- moves ---------------------------------------------------------------------

    def keep_anchor(self) -> None:
        """See to it that the anchor holds the weights as they are, before a move.

        To host memory, where low memory keeps it: queued, without waiting.
        """
        if not self._owed:
            return
        for bucket in self.tracked_buckets():
            self._copied = copy_across(self.ops, bucket.parameters, bucket.anchors)
        self._owed = False

    def move(
        self, coefficients: Tensor, scale: float, *, revocable: bool = True
    ) -> bool:
        """theta_l += scale * sum_j coefficients[l, j] b_jl.

        Args:
            coefficients: (L, J).
            scale: The share of the whole move that this call makes.
            revocable: Whether somebody may take the move back.

        Returns:
            False when a new weight would not have been finite; then nothing moved.
        """
        verdicts = []
        buckets = self.tracked_buckets()
        # Of several buckets, one may refuse what another has made.
        kept = revocable or not self.low_memory or len(buckets) > 1
        if kept:
            self.keep_anchor()
        for bucket in buckets:
            basis = bucket.basis
            chosen = coefficients[:, : len(basis)]
            if len(bucket.rows) != len(coefficients):
                chosen = chosen[bucket.rows]
            written = self.ops.apply(
                bucket.parameters,
                basis,
                chosen.to(torch.float32),
                scale,
                bucket.basis_sq,
                bucket.vouched,
            )[-1]
            if bucket.on_host:
                bucket.vouch(bool(written))
            verdicts.append(written)
        self.moved = self.moved or kept
        if len(verdicts) == 1 and verdicts[0].device.type != "cpu":
            # The kernel has already refused a bad move on the device; waiting for
            # its answer would stall every step.
            return True
        return all(bool(v) for v in verdicts)

    def combine(self, coefficients: Tensor) -> list[Tensor]:
        """sum_j coefficients[l, j] b_jl for every tracked tensor, as new tensors."""
        return directions.combine(self.tracked_buckets(), coefficients)

    def displacements(self) -> list[Tensor]:
        """S of every tracked tensor, in row order; not copies."""
        return directions.displacements(self.tracked_buckets())

    def add(self, tensors: list[Tensor]) -> None:
        """theta_l += tensor_l for every tracked tensor, in row order."""
        self.keep_anchor()
        directions.add(self.tracked_buckets(), tensors)
        self.moved = True

    def roll_back(self) -> None:
        """Weights <- anchor, bit for bit."""
        for bucket in () if self._owed else self.tracked_buckets():
            copy_across(self.ops, bucket.anchors, bucket.parameters)
        self.moved = False

    # -- averaged weights ------------------------------------------------------------

    @contextmanager
    def averaged(self, share: float = 1.0) -> Iterator[None]:
        """Weights <- theta - share v inside (1: their EMA); the very bits back on exit.

        Without lag (memory="low", or before the first step) the weights stay.
        """
        self.refresh()
        buckets = [] if self.low_memory else self.tracked_buckets()
        with averaged(buckets, self._lag, self.ops, share):
            yield

    # -- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The flags and the host-bound slopes; tensors live in the base's state."""
        if self._copied is not None:
            self._copied.synchronize()
        return {
            "anchored": self.anchored,
            "moved": self.moved,
            "owed": self._owed,
            "stepped": self.stepped,
            "held": self.held,
            **self._lag.state_dict(),
            "slopes": [[list(r), s.detach().cpu()] for r, s in self._slopes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.anchored = bool(state["anchored"])
        self.moved = bool(state["moved"])
        self._owed = bool(state.get("owed", False))
        self.stepped = bool(state["stepped"])
        self.held = bool(state.get("held", False))
        self._lag.load_state_dict(state)
        parameters = self.parameters()
        self._slopes = [
            (list(rows), values.to(local(parameters[rows[0]]).device))
            for rows, values in state["slopes"]
            if rows
        ]

    def _clear(self, *, drifts: bool = False) -> None:
        with torch.no_grad():
            clear(self.tracked_buckets(), drifts=drifts)
        self._lag.reset()
        self._slopes, self.anchored = [], False

    # -- lists per device --------------------------------------------------------------

    def _all(self) -> list[Bucket]:
        return self._table.current(self.parameters())

    def tracked_buckets(self) -> list[Bucket]:
        """Those whose parameters have hybrid tensors."""
        return [b for b in self._all() if b.tracked]
