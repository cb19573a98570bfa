"""The hybrid tensors in the base's ``state[p]``: which there are, and their making."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.weights.buckets import (
    ANCHOR,
    DRIFT_KEY,
    KEYS,
    LAG_KEY,
    LEAD_KEYS,
    STEP_KEY,
    WINDOW_KEY,
)
from hybridopt.weights.local import local, shard_numel

__all__ = ["HybridTensors"]

_MIB = 2.0**20


class HybridTensors:
    """Allocates, counts and mends what ``weights/space.py`` works on.

    Args:
        base: Its state holds them.
        config: ``memory``, ``memory_budget``, budgets of ``drift`` and ``lead``.
    """

    def __init__(self, base: torch.optim.Optimizer, config: HybridConfig) -> None:
        self.base = base
        self.low_memory = config.memory == "low"
        self._budget = config.memory_budget * _MIB
        self._drift_budget = config.drift.memory_budget * _MIB
        self._wants_drift = config.drift.enabled and not self.low_memory
        self._lead_budget = config.lead.memory_budget * _MIB
        self._wants_lead = config.lead.enabled and not self.low_memory
        self._leads_on_gpu = config.lead.on_gpu

    def extra_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Bytes that they take on the parameters' devices, on this rank."""
        state = self.base.state
        total = 0
        for p in parameters:
            for key in KEYS:
                tensor = state[p].get(key) if p in state else None
                if tensor is not None and local(tensor).device == local(p).device:
                    total += local(tensor).nbytes
        return total

    def drifts(self, parameters: Sequence[Tensor]) -> bool:
        """Whether drift moves are made: their two directions, in bf16 if need be, fit
        into ``drift.memory_budget``.
        """
        if not self._wants_drift:
            return False
        return 2 * 2 * sum(shard_numel(p) for p in parameters) <= self._drift_budget

    def leads(self, parameters: Sequence[Tensor]) -> bool:
        """Whether weights may be put ahead: two displacements, in bf16 if need be, fit
        into ``lead.memory_budget``, and weights are precise enough to take a lead back.
        """
        if not self._wants_lead:
            return False
        for p in parameters:
            here = self._leads_on_gpu or local(p).device.type == "cpu"
            if not here or p.dtype not in (torch.float32, torch.float64):
                return False
        return 2 * 2 * sum(shard_numel(p) for p in parameters) <= self._lead_budget

    def allocate(self, parameters: Sequence[Tensor]) -> None:
        """Make those of every parameter that the base has stepped (it has a gradient)
        or holds state for, and that has none yet.
        """
        drifts, leads = self.drifts(parameters), self.leads(parameters)
        for p in parameters:
            # ``in`` first: reading the state of an unknown parameter would insert it.
            known = p in self.base.state
            tracked = known and ANCHOR in self.base.state[p]
            filled = known and len(self.base.state[p]) > 0
            if tracked or not (filled or p.grad is not None):
                continue
            state = self.base.state[p]
            dtype = self._basis_dtype(p, parameters)
            with torch.no_grad():
                # One expression per key keeps DTensor placements.
                state[ANCHOR] = self._new_anchor(p)
                state[STEP_KEY] = torch.zeros_like(p.detach(), dtype=dtype)
                if not self.low_memory:
                    state[LAG_KEY] = torch.zeros_like(p.detach(), dtype=dtype)
                if drifts:
                    self._begin(p, (WINDOW_KEY, DRIFT_KEY), dtype)
                if leads:
                    self._begin(p, LEAD_KEYS, dtype)

    def restore(self, parameters: Sequence[Tensor]) -> bool:
        """Mend what ``load_state_dict`` left: it casts to the parameter's dtype, and
        what was saved with less memory has no drift yet.

        Returns:
            Whether anything had to be mended.
        """
        mended = False
        drifts, leads = self.drifts(parameters), self.leads(parameters)
        for p in parameters:
            state = self.base.state.get(p, {})
            dtype = self._basis_dtype(p, parameters)
            for key in KEYS[1:]:
                if key in state and state[key].dtype != dtype:
                    state[key] = state[key].to(dtype)
                    mended = True
            if drifts and LAG_KEY in state and WINDOW_KEY not in state:
                self._begin(p, (WINDOW_KEY, DRIFT_KEY), dtype)
                mended = True
            if leads and LAG_KEY in state and LEAD_KEYS[0] not in state:
                self._begin(p, LEAD_KEYS, dtype)
            offloaded = self.low_memory and not hasattr(p, "placements")
            if offloaded and ANCHOR in state and local(p).device.type != "cpu":
                state[ANCHOR] = local(state[ANCHOR]).cpu().pin_memory()
        return mended

    def _begin(self, p: Tensor, keys: Sequence[str], dtype: torch.dtype) -> None:
        for key in keys:
            self.base.state[p][key] = torch.zeros_like(p.detach(), dtype=dtype)

    def _basis_dtype(
        self, parameter: Tensor, parameters: Sequence[Tensor]
    ) -> torch.dtype:
        """Precision of the directions: the parameter's own when they all fit into
        ``memory_budget`` that way, else bf16, which keeps anchor, step and lag at two
        copies, drift at a third, and the lead at a fourth.
        """
        if parameter.dtype.itemsize <= 2 or self.low_memory:
            return parameter.dtype
        copies = 2 + 2 * self.drifts(parameters) + 2 * self.leads(parameters)
        held = sum(shard_numel(p) * p.itemsize for p in parameters)
        return parameter.dtype if copies * held <= self._budget else torch.bfloat16

    def _new_anchor(self, p: Tensor) -> Tensor:
        # A shard stays on its device: as a plain tensor it would be saved as a whole.
        sharded = hasattr(p, "placements")
        if not self.low_memory or sharded or local(p).device.type == "cpu":
            return p.detach().clone(memory_format=torch.preserve_format)
        plain = local(p)
        return torch.zeros(plain.shape, dtype=plain.dtype, pin_memory=True)
