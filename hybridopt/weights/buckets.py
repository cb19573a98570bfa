"""Parameters of one kind with their gradients and hybrid tensors, for one kernel call.

Looking everything up costs more host time than launching the kernels, so the lists are
kept from step to step, and checked at each: frameworks swap parameters inside existing
groups, and replace state when they move or load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import ConfigError
from hybridopt.kernels.recent import Steady
from hybridopt.weights.local import local

__all__ = [
    "ANCHOR",
    "DRIFT_KEY",
    "KEYS",
    "LAG_KEY",
    "LEAD_KEYS",
    "STEP_KEY",
    "WINDOW_KEY",
    "Bucket",
    "BucketTable",
]

ANCHOR = "hybrid_anchor"
STEP_KEY = "hybrid_step"
LAG_KEY = "hybrid_lag"
WINDOW_KEY = "hybrid_window"
DRIFT_KEY = "hybrid_drift"
LEAD_KEYS = ("hybrid_lead", "hybrid_lead_other")
KEYS = (ANCHOR, STEP_KEY, LAG_KEY, WINDOW_KEY, DRIFT_KEY, *LEAD_KEYS)
"""Keys in ``state[p]``; a fixed set, all there after the base's first step."""


_is_sparse = attrgetter("is_sparse")


@dataclass(slots=True)
class Bucket:
    """Local tensors of parameters that share device, dtype, gradient and state."""

    tracked: bool
    """Whether they have hybrid tensors."""
    rows: list[int] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    """The parameters themselves, whose ``grad`` is read anew each step."""
    parameters: list[Tensor] = field(default_factory=Steady)
    gradients: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=Steady)
    steps: list[Tensor] = field(default_factory=Steady)
    lags: list[Tensor] = field(default_factory=Steady)
    windows: list[Tensor] = field(default_factory=Steady)
    drifts: list[Tensor] = field(default_factory=Steady)
    leads: tuple[list[Tensor], list[Tensor]] = field(
        default_factory=lambda: (Steady(), Steady())
    )
    """The base's last two displacements, with their sign turned (``ahead.py``)."""
    step_sq: Tensor | None = None
    """(rows,) ||s||^2 where it is known since s was written; CPU only."""
    drift_sq: Tensor | None = None
    """(rows,) ||d||^2 likewise."""
    plain: bool = True
    """Whether no parameter is a shard or complex: its gradient is what it seems."""
    flattened: bool = False
    """Whether some tensors are kept as vectors; their gradients then come along."""
    finite_at: list[int] | None = None
    """Version of every parameter when all its weights were last known to be finite."""

    def add(self, row: int, parameter: Tensor, state: dict[str, Tensor] | None) -> None:
        """Take in one parameter and its hybrid tensors."""
        self.rows.append(row)
        self.sources.append(parameter)
        keys = () if state is None else [k for k in KEYS if k in state]
        held = {k: local(state[k]) for k in keys} if state is not None else {}
        found = local(parameter)
        self.plain = self.plain and found is parameter
        if _flattens(found, held):
            # Small tensors cost calls, not arithmetic: views are made once, not daily.
            self.flattened = True
            found = found.detach().view(-1)
            held = {key: tensor.detach().view(-1) for key, tensor in held.items()}
        self.parameters.append(found)
        for key, part in (
            (ANCHOR, self.anchors),
            (STEP_KEY, self.steps),
            (LAG_KEY, self.lags),
            (WINDOW_KEY, self.windows),
            (DRIFT_KEY, self.drifts),
            *zip(LEAD_KEYS, self.leads, strict=True),
        ):
            if key in held:
                part.append(held[key])

    @property
    def basis(self) -> list[list[Tensor]]:
        """The directions in column order: STEP, then DRIFT."""
        return [part for part in (self.steps, self.drifts) if part]

    @property
    def basis_sq(self) -> list[Tensor | None]:
        """Squared norms of the directions in column order; None where unknown."""
        parts = ((self.steps, self.step_sq), (self.drifts, self.drift_sq))
        return [squares for part, squares in parts if part]

    def remember(self, values: Tensor) -> None:
        """Keep the norms in one result of ``Ops.observe``, until they are written."""
        directions = len(self.basis)
        norms = values[:, 1 + directions :].unbind(1)
        self.step_sq = norms[0] if self.steps else None
        self.drift_sq = norms[1] if self.drifts else None

    @property
    def on_host(self) -> bool:
        """Whether sums of these tensors can be looked at without waiting."""
        return self.parameters[0].device.type == "cpu"

    def shaped(self, place: int, tensor: Tensor) -> Tensor:
        """A tensor of this bucket in the shape of its parameter."""
        return tensor.view(local(self.sources[place]).shape)

    # -- are the weights finite? ----------------------------------------------------

    def vouch(self, finite: bool) -> None:
        """Remember that all weights are finite now, or that this is not known."""
        self.finite_at = [p._version for p in self.parameters] if finite else None

    @property
    def vouched(self) -> bool:
        """Whether all weights are known to be finite: nobody has written them since."""
        seen = self.finite_at
        return seen is not None and seen == [p._version for p in self.parameters]

    def read_gradients(self) -> None:
        """Fetch the gradients of this step.

        Raises:
            ConfigError: A gradient is sparse.
        """
        gradients = [p.grad for p in self.sources]
        if gradients[0] is None:
            self.gradients = []
            return
        found = [g for g in gradients if g is not None]
        if any(map(_is_sparse, found)):
            numbered = zip(self.rows, gradients, strict=True)
            row, bad = next(
                (r, g) for r, g in numbered if g is not None and _is_sparse(g)
            )
            raise ConfigError(
                f"gradient of parameter {row} (shape {tuple(bad.shape)}): is sparse; "
                "predicted moves need dense gradients. Use "
                "nn.Embedding(sparse=False), or enabled=False."
            )
        if not self.plain:
            found = list(map(local, found))
        if self.flattened:
            pairs = zip(found, self.parameters, strict=True)
            found = [g if g.dim() == p.dim() else g.reshape(-1) for g, p in pairs]
        self.gradients = found


def _flattens(parameter: Tensor, held: dict[str, Tensor]) -> bool:
    """Whether all of them can be seen as vectors in the same order, on the CPU."""
    return all(
        t.device.type == "cpu" and t.is_contiguous()
        for t in (parameter, *held.values())
    )


class BucketTable:
    """The buckets of one base optimizer, rebuilt when what they rest on has changed."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base = base
        self._ready = False
        self._parameters: list[Tensor] = []
        self._present: list[bool] = []
        self._keys: list[Tensor] = []
        self._values: list[Any] = []
        self._samples: list[tuple[dict[str, Any], str, Any]] = []
        self._pointers: list[int] = []
        self._buckets: list[Bucket] = []

    def refresh(self) -> None:
        """Look everything up anew at the next ``current``; call once per step."""
        self._ready = False
        for bucket in self._buckets:
            # Kept any longer, they would keep the gradients' memory alive.
            bucket.gradients = []

    def forget(self) -> None:
        """Drop the lists: hybrid tensors were allocated or replaced."""
        self.refresh()
        self._parameters = []

    def current(self, parameters: list[Tensor]) -> list[Bucket]:
        """Buckets of these parameters, with this step's gradients."""
        if self._ready:
            return self._buckets
        present = [p.grad is not None for p in parameters]
        if not self._valid(parameters, present):
            self._build(parameters, present)
        for bucket in self._buckets:
            bucket.read_gradients()
        self._ready = True
        return self._buckets

    def _valid(self, parameters: list[Tensor], present: list[bool]) -> bool:
        if len(parameters) != len(self._parameters):
            return False
        # A predicted step has no gradients at all; who is with whom then means nothing.
        if present != self._present and any(present):
            return False
        # Entry by entry in the state's own order: looking parameters up hashes them.
        state, keys = self._base.state, self._keys
        return (
            all(map(is_, parameters, self._parameters))
            and len(state) == len(keys)
            and all(map(is_, state.keys(), keys))
            and all(map(is_, state.values(), self._values))
            # Who moves state to another device and back replaces all of it.
            and all([held.get(key) is old for held, key, old in self._samples])
            # ``p.data = other`` keeps the parameter and leaves views of old memory.
            and list(map(Tensor.data_ptr, parameters)) == self._pointers
        )

    def _build(self, parameters: list[Tensor], present: list[bool]) -> None:
        found: dict[Any, Bucket] = {}
        plain = True
        state = self._base.state
        for row, (p, has) in enumerate(zip(parameters, present, strict=True)):
            # ``get``, because indexing would insert the state of an unknown parameter.
            held = state.get(p)
            tracked = held is not None and ANCHOR in held
            key = (p.device, p.dtype, tracked, has)
            bucket = found.get(key)
            if bucket is None:
                bucket = found[key] = Bucket(tracked)
            bucket.add(row, p, held if tracked else None)
            # A sharded parameter's local tensor may be replaced without a trace.
            plain = plain and not hasattr(p, "_local_tensor")
        self._buckets = list(found.values())
        self._parameters = list(parameters) if plain else []
        self._present = present
        self._keys, self._values = list(state.keys()), list(state.values())
        ends = [held for held in self._values if ANCHOR in held]
        self._samples = [
            (held, key, held[key])
            for held in (*ends[:1], *ends[-1:])
            for key in KEYS
            if key in held
        ]
        self._pointers = list(map(Tensor.data_ptr, parameters)) if plain else []
