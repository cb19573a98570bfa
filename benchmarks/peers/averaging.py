"""EMA evaluation: the bare base, judged at a running average of its weights."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure, PeerOptimizer, swapped

__all__ = ["EMAEvaluation"]


class EMAEvaluation(PeerOptimizer):
    """Leaves training alone and evaluates at e <- beta_t e + (1 - beta_t) theta.

    beta_t = min(beta, (1 + t) / (10 + t)), so that short runs are not held back by
    the start (the usual warm-up of the decay). BatchNorm buffers are those of the run.
    """

    def __init__(self, base: Optimizer, *, beta: float = 0.98) -> None:
        super().__init__(base)
        self.beta, self.count = beta, 0
        self.average = self.copies()

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        loss = self.gradient(closure)
        self.base.step()
        self.count += 1
        beta = min(self.beta, (1.0 + self.count) / (10.0 + self.count))
        torch._foreach_lerp_(self.average, self.tensors, 1.0 - beta)
        return loss

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights in, the training weights back on exit."""
        return swapped(self.tensors, self.average)
