"""Lookahead: k fast steps forward, one slow step back."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure, PeerOptimizer, swapped

__all__ = ["Lookahead"]


class Lookahead(PeerOptimizer):
    """Every k base steps: slow += alpha (fast - slow), fast = slow.

    Source: Zhang, Lucas, Hinton, Ba 2019, arXiv 1907.08610, algorithm 1; k 5 and
    alpha 0.5 are its defaults. The fast optimizer's moments are kept.
    """

    def __init__(self, base: Optimizer, *, k: int = 5, alpha: float = 0.5) -> None:
        super().__init__(base)
        self.k, self.alpha, self.count = k, alpha, 0
        self.slow = self.copies()

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        loss = self.gradient(closure)
        self.base.step()
        self.count += 1
        if self.count % self.k == 0:
            torch._foreach_lerp_(self.slow, self.tensors, self.alpha)
            self.write(self.slow)
        return loss

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """The slow weights, which are what the paper evaluates."""
        return swapped(self.tensors, self.slow)
