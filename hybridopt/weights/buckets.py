"""Parameters of one kind with their gradients and hybrid tensors, for one kernel call.

Looking everything up costs more host time than launching the kernels, so the lists are
kept from step to step, and checked at each: frameworks swap parameters inside existing
groups, and replace state when they move or load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import ConfigError
from hybridopt.weights.local import local

__all__ = [
    "ANCHOR",
    "DRIFT_KEY",
    "KEYS",
    "LAG_KEY",
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
KEYS = (ANCHOR, STEP_KEY, LAG_KEY, WINDOW_KEY, DRIFT_KEY)
"""Keys in ``state[p]``; a fixed set, all there after the base's first step."""


@dataclass(slots=True)
class Bucket:
    """Local tensors of parameters that share device, dtype, gradient and state."""

    tracked: bool
    """Whether they have hybrid tensors."""
    rows: list[int] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    """The parameters themselves, whose ``grad`` is read anew each step."""
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    lags: list[Tensor] = field(default_factory=list)
    windows: list[Tensor] = field(default_factory=list)
    drifts: list[Tensor] = field(default_factory=list)

    def add(self, row: int, parameter: Tensor, state: dict[str, Tensor] | None) -> None:
        """Take in one parameter and its hybrid tensors."""
        self.rows.append(row)
        self.sources.append(parameter)
        self.parameters.append(local(parameter))
        if state is not None:
            self.anchors.append(local(state[ANCHOR]))
            self.steps.append(local(state[STEP_KEY]))
            if LAG_KEY in state:
                self.lags.append(local(state[LAG_KEY]))
            if DRIFT_KEY in state:
                self.windows.append(local(state[WINDOW_KEY]))
                self.drifts.append(local(state[DRIFT_KEY]))

    @property
    def basis(self) -> list[list[Tensor]]:
        """The directions in column order: STEP, then DRIFT."""
        return [part for part in (self.steps, self.drifts) if part]

    def read_gradients(self) -> None:
        """Fetch the gradients of this step.

        Raises:
            ConfigError: A gradient is sparse.
        """
        gradients = [p.grad for p in self.sources]
        if gradients[0] is None:
            self.gradients = []
            return
        for row, gradient in zip(self.rows, gradients, strict=True):
            if gradient is not None and gradient.is_sparse:
                raise ConfigError(
                    f"gradient of parameter {row} (shape {tuple(gradient.shape)}): is "
                    "sparse; predicted moves need dense gradients. Use "
                    "nn.Embedding(sparse=False), or enabled=False."
                )
        self.gradients = [local(g) for g in gradients if g is not None]


class BucketTable:
    """The buckets of one base optimizer, rebuilt when what they rest on has changed."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base = base
        self._ready = False
        self._parameters: list[Tensor] = []
        self._present: list[bool] = []
        self._states: list[Any] = []
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
        state = self._base.state
        present = [p.grad is not None for p in parameters]
        # ``get``, because indexing would insert the state of an unknown parameter.
        states = [state.get(p) for p in parameters]
        if not self._valid(parameters, present, states):
            self._build(parameters, present, states)
        for bucket in self._buckets:
            bucket.read_gradients()
        self._ready = True
        return self._buckets

    def _valid(
        self, parameters: list[Tensor], present: list[bool], states: list[Any]
    ) -> bool:
        if len(parameters) != len(self._parameters) or present != self._present:
            return False
        same = all(a is b for a, b in zip(parameters, self._parameters, strict=True))
        return same and all(a is b for a, b in zip(states, self._states, strict=True))

    def _build(
        self, parameters: list[Tensor], present: list[bool], states: list[Any]
    ) -> None:
        found: dict[Any, Bucket] = {}
        plain = True
        for row, (p, has, held) in enumerate(
            zip(parameters, present, states, strict=True)
        ):
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
        self._present, self._states = present, states
