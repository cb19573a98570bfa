"""SNOO: Nesterov momentum on the displacement of K inner steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure, PeerOptimizer

__all__ = ["SNOO"]


class SNOO(PeerOptimizer):
    """Every K base steps, with the pseudo-gradient q = outer - inner:

        b <- mu b + q;  outer <- outer - rate (q + mu b);  inner = outer.

    Source: Kallusky et al. 2025, arXiv 2510.15830 (step-K Nesterov outer optimizer);
    K 28, rate 0.68 and mu 0.37 are the values of its public speed-run entry.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        k: int = 28,
        rate: float = 0.68,
        momentum: float = 0.37,
    ) -> None:
        super().__init__(base)
        self.k, self.rate, self.momentum, self.count = k, rate, momentum, 0
        self.outer = self.copies()
        self.buffer = [torch.zeros_like(p) for p in self.outer]

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        loss = self.gradient(closure)
        self.base.step()
        self.count += 1
        if self.count % self.k == 0:
            pseudo = torch._foreach_sub(self.outer, self.tensors)
            torch._foreach_mul_(self.buffer, self.momentum)
            torch._foreach_add_(self.buffer, pseudo)
            torch._foreach_add_(pseudo, self.buffer, alpha=self.momentum)
            torch._foreach_add_(self.outer, pseudo, alpha=-self.rate)
            self.write(self.outer)
        return loss
