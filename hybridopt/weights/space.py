"""Weight space: the only room, besides the base optimizer, that writes parameters.

Three tensors per parameter, kept in the base's own ``state[p]`` so that they follow the
parameters through every checkpoint: the *anchor* (weights after the last real step, what
a rollback restores), the *step* s (the base's last displacement) and the *lag* v = theta
- ema(theta) (the filtered drift). A predicted move shifts weights and EMA alike, so
neither s nor v changes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.errors import ConfigError
from hybridopt.protocols import Ops
from hybridopt.types import BASIS_SIZE, LAG, STEP
from hybridopt.weights.local import local, same_kind

__all__ = ["ANCHOR", "KEYS", "Reading", "WeightSpace"]

ANCHOR = "hybrid_anchor"
STEP_KEY = "hybrid_step"
LAG_KEY = "hybrid_lag"
KEYS = (ANCHOR, STEP_KEY, LAG_KEY)
"""Keys in ``state[p]``; a fixed set, all there after the base's first step."""

_MIB = 2.0**20


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over gradients and basis measured, still on this rank.

    Rows of tensors that had no gradient are zero.
    """

    statistics: Tensor
    """(L, 1 + 2 J) float64 CPU: ||g||^2, <g, b_j>, ||b_j||^2 per tensor."""
    loss: float
    """Local loss; nan when there was none."""
    slopes: Tensor
    """(L,) float64 CPU: -<g, s> of the base step before this one."""


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
        self._budget = config.memory_budget * _MIB
        self.anchored = False
        """Whether the anchor holds the weights that the last real step left."""
        self.moved = False
        """Whether a predicted move was made since the anchor was set."""
        self._slopes: list[tuple[list[int], Tensor]] = []

    # -- what there is -------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Every trainable parameter in group order; L is the length of this list."""
        return [
            p for g in self.base.param_groups for p in g["params"] if p.requires_grad
        ]

    def _tracked(self, parameter: Tensor) -> bool:
        # ``in`` first: reading the state of an unknown parameter would insert it.
        state = self.base.state
        return parameter in state and ANCHOR in state[parameter]

    @property
    def ready(self) -> bool:
        """Whether some parameter has its hybrid tensors."""
        return any(self._tracked(p) for p in self.parameters())

    def extra_bytes(self) -> int:
        """Bytes that the hybrid tensors of this rank take on the device."""
        state = self.base.state
        total = 0
        for p in self.parameters():
            for key in KEYS:
                tensor = state[p].get(key) if p in state else None
                if tensor is not None and local(tensor).device == local(p).device:
                    total += local(tensor).nbytes
        return total

    def basis_dtype(self, parameter: Tensor) -> torch.dtype:
        """Precision of s and v: the parameter's own when two full copies fit into
        ``memory_budget``, else bf16, which keeps the total at two copies."""
        if parameter.dtype.itemsize <= 2 or self.low_memory:
            return parameter.dtype
        total = sum(local(p).nbytes for p in self.parameters())
        return parameter.dtype if 2 * total <= self._budget else torch.bfloat16

    def allocate(self) -> None:
        """Give every parameter its hybrid tensors, after the base has filled its state.

        Bases test ``len(state[p]) == 0`` to initialize, so this never comes first: only
        parameters that the base has stepped (they have a gradient) or holds state for.
        """
        for p in self.parameters():
            filled = p in self.base.state and len(self.base.state[p]) > 0
            if self._tracked(p) or not (filled or p.grad is not None):
                continue
            state = self.base.state[p]
            dtype = self.basis_dtype(p)
            with torch.no_grad():
                # One expression per key keeps DTensor placements.
                state[ANCHOR] = self._new_anchor(p)
                state[STEP_KEY] = torch.zeros_like(p.detach(), dtype=dtype)
                if not self.low_memory:
                    state[LAG_KEY] = torch.zeros_like(p.detach(), dtype=dtype)

    def complete(self) -> bool:
        """Whether every parameter that has a gradient has its hybrid tensors."""
        return all(self._tracked(p) for p in self.parameters() if p.grad is not None)

    def forget(self) -> None:
        """Start over from the weights as they are: no displacement, no drift."""
        self.allocate()
        with torch.no_grad():
            for group in self._groups():
                torch._foreach_zero_([*group.steps, *group.lags])
        self._slopes = []
        self.anchored = False
        self.moved = False

    def _new_anchor(self, p: Tensor) -> Tensor:
        if not self.low_memory or local(p).device.type == "cpu":
            return p.detach().clone(memory_format=torch.preserve_format)
        plain = local(p)
        return torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True)

    def restore_dtypes(self) -> None:
        """Undo the cast to the parameter's dtype that ``load_state_dict`` makes."""
        for p in self.parameters():
            state = self.base.state.get(p, {})
            for key in (STEP_KEY, LAG_KEY):
                if key in state and state[key].dtype != self.basis_dtype(p):
                    state[key] = state[key].to(self.basis_dtype(p))
            if self.low_memory and ANCHOR in state and local(p).device.type != "cpu":
                state[ANCHOR] = local(state[ANCHOR]).cpu().pin_memory()

    # -- one real step -------------------------------------------------------------

    def observe(self, loss: Tensor | float | None) -> Reading:
        """Measure gradient against basis; one transfer to the host per device.

        Reads everything, writes nothing.
        """
        parameters = self.parameters()
        width = 1 + 2 * BASIS_SIZE
        statistics = torch.zeros(len(parameters), width, dtype=torch.float64)
        transfers: list[tuple[list[int], Tensor]] = []
        for rows in self._rows(parameters, gradient=True):
            gradients = [_gradient(parameters[i], i) for i in rows]
            basis = self._group([parameters[i] for i in rows]).basis
            transfers.append((rows, self.ops.observe(gradients, basis)))
        for rows in self._rows(parameters, gradient=True, tracked=False):
            gradients = [_gradient(parameters[i], i) for i in rows]
            transfers.append((rows, self.ops.observe(gradients, [])))
        host_loss, extra = float("nan"), None
        if isinstance(loss, Tensor):
            extra = loss.detach().reshape(1)
        elif loss is not None:
            host_loss = float(loss)
        slopes = torch.zeros(len(parameters), dtype=torch.float64)
        pending = dict(enumerate(self._slopes))
        for index, (rows, values) in enumerate(transfers):
            pieces = [values.reshape(-1)]
            before = pending.get(index)
            if before is not None and before[1].device == values.device:
                pieces.append(before[1].to(values.dtype))
            if extra is not None and extra.device == values.device:
                pieces.append(extra.to(values.dtype))
            host = torch.cat(pieces).to("cpu", torch.float64)
            columns = _columns(values.shape[1])
            block = host[: values.numel()].view(len(rows), -1)
            if len(rows) == len(parameters) and len(columns) == width:
                statistics = block
            else:
                target = torch.tensor(rows).unsqueeze(1)
                statistics[target, torch.tensor(columns)] = block
            cursor = values.numel()
            if before is not None and before[1].device == values.device:
                slopes[before[0]] = -host[cursor : cursor + len(before[0])]
                cursor += len(before[0])
            if extra is not None and extra.device == values.device:
                host_loss, extra = float(host[cursor]), None
        if extra is not None:
            host_loss = float(extra)
        return Reading(statistics, host_loss, slopes)

    def before_base(self) -> None:
        """Remember the weights that the base is about to move."""
        if self.low_memory:
            for group in self._groups():
                self.ops.copy(group.parameters, group.steps)
        elif not self.anchored or self.moved:
            for group in self._groups():
                self.ops.copy(group.parameters, group.anchors)
        self.moved = False

    def after_base(self) -> None:
        """Take in the base's step: s, v and the anchor."""
        self._slopes = []
        parameters = self.parameters()
        for rows in self._rows(parameters, gradient=False):
            # Nothing moved these; they keep no displacement.
            group = self._group([parameters[i] for i in rows])
            torch._foreach_zero_(group.steps)
            self.ops.copy(group.parameters, group.anchors)
        for rows in self._rows(parameters, gradient=True):
            group = self._group([parameters[i] for i in rows])
            gradients = [_gradient(parameters[i], i) for i in rows]
            if self.low_memory:
                dots = self._advance_low(group, gradients)
            else:
                dots = self.ops.advance(
                    group.parameters,
                    gradients,
                    group.anchors,
                    group.steps,
                    group.lags,
                    self.beta,
                )[:, 0]
            self._slopes.append((rows, dots))
        self.anchored = True
        self.moved = False

    def _advance_low(self, group: _Group, gradients: Sequence[Tensor]) -> Tensor:
        # s holds the weights before the base step; s <- theta - s in place.
        torch._foreach_neg_(group.steps)
        torch._foreach_add_(group.steps, group.parameters)
        self.ops.copy(group.parameters, group.anchors)
        return self.ops.observe(gradients, [group.steps])[:, 1]

    # -- moves ---------------------------------------------------------------------

    def move(self, coefficients: Tensor, scale: float) -> bool:
        """theta_l += scale * sum_j coefficients[l, j] b_jl.

        Args:
            coefficients: (L, J).
            scale: The share of the whole move that this call makes.

        Returns:
            False when a new weight would not have been finite; then nothing moved.
        """
        parameters = self.parameters()
        verdicts = []
        for rows in self._rows(parameters):
            group = self._group([parameters[i] for i in rows])
            columns = len(group.basis)
            chosen = coefficients[rows, :columns].to(torch.float32)
            verdicts.append(
                self.ops.apply(group.parameters, group.basis, chosen, scale)[-1:]
            )
        self.moved = True
        if len(verdicts) == 1 and verdicts[0].device.type != "cpu":
            # The kernel has already refused a bad move on the device; waiting for
            # its answer would stall every step.
            return True
        return all(bool(v) for v in verdicts)

    def roll_back(self) -> None:
        """Weights <- anchor, bit for bit."""
        for group in self._groups():
            self.ops.copy(group.anchors, group.parameters)
        self.moved = False

    # -- averaged weights ------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Weights <- theta - v (their EMA) inside; the very bits back on exit.

        Without lag (memory="low", or before the first step) the weights stay.
        """
        if self.low_memory or not self.ready:
            yield
            return
        groups = list(self._groups())
        kept = [[p.clone() for p in g.parameters] for g in groups]
        with torch.no_grad():
            for g in groups:
                lags = [v.to(p.dtype) for v, p in zip(g.lags, g.parameters, strict=True)]
                torch._foreach_sub_(g.parameters, lags)
        try:
            yield
        finally:
            with torch.no_grad():
                for g, old in zip(groups, kept, strict=True):
                    self.ops.copy(old, g.parameters)

    # -- state -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The flags and the host-bound slopes; tensors live in the base's state."""
        rows = [(list(r), s.detach().cpu()) for r, s in self._slopes]
        return {
            "anchored": self.anchored,
            "moved": self.moved,
            "slopes": [[r, s] for r, s in rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.anchored = bool(state["anchored"])
        self.moved = bool(state["moved"])
        parameters = self.parameters()
        self._slopes = [
            (list(rows), values.to(local(parameters[rows[0]]).device))
            for rows, values in state["slopes"]
            if rows
        ]

    # -- lists per device --------------------------------------------------------------

    def _rows(
        self,
        parameters: Sequence[Tensor],
        gradient: bool | None = None,
        tracked: bool = True,
    ) -> list[list[int]]:
        """Row indices by (device, dtype), since one kernel call takes one kind.

        Args:
            gradient: Only parameters with (True) or without (False) a gradient.
            tracked: Parameters with hybrid tensors, or those without.
        """
        chosen = [
            i
            for i, p in enumerate(parameters)
            if self._tracked(p) is tracked
            and (gradient is None or (p.grad is not None) is gradient)
        ]
        return same_kind([parameters[i] for i in chosen], chosen)

    def _groups(self) -> Iterator[_Group]:
        parameters = self.parameters()
        for rows in self._rows(parameters):
            yield self._group([parameters[i] for i in rows])

    def _group(self, parameters: Sequence[Tensor]) -> _Group:
        states = [self.base.state[p] for p in parameters]
        return _Group(
            [local(p) for p in parameters],
            [local(s[ANCHOR]) for s in states],
            [local(s[STEP_KEY]) for s in states],
            [] if self.low_memory else [local(s[LAG_KEY]) for s in states],
        )


@dataclass(slots=True)
class _Group:
    """Local tensors of parameters that share a device and a dtype."""

    parameters: list[Tensor]
    anchors: list[Tensor]
    steps: list[Tensor]
    lags: list[Tensor]

    @property
    def basis(self) -> list[list[Tensor]]:
        columns: list[list[Tensor]] = [[]] * (2 if self.lags else 1)
        columns[STEP] = self.steps
        if self.lags:
            columns[LAG] = self.lags
        return columns


def _columns(width: int) -> list[int]:
    """Columns of the full (L, 1 + 2 J) statistics that a narrower reading fills."""
    directions = (width - 1) // 2
    return [0, *range(1, 1 + directions), *(1 + BASIS_SIZE + j for j in range(directions))]


def _gradient(parameter: Tensor, row: int) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise ConfigError(f"parameter {row}: has no gradient to read.")
    if gradient.is_sparse:
        raise ConfigError(
            f"gradient of parameter {row} (shape {tuple(parameter.shape)}): is sparse; "
            "predicted moves need dense gradients. Use nn.Embedding(sparse=False), or "
            "enabled=False."
        )
    return local(gradient)
