"""Linear extrapolation of EMA-filtered weights, with one fixed gain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure, PeerOptimizer

__all__ = ["FilteredExtrapolation"]


class FilteredExtrapolation(PeerOptimizer):
    """Every K base steps moves iterate and filter along the filter's displacement:

        e <- beta e + (1 - beta) theta after each step;
        d = e - e_at_last_move;  theta += gain d;  e += gain d.

    The plain form of what trajectory-extrapolation papers do (introspection, weight
    nowcasting), with the filter that keeps it from amplifying noise. Moving iterate
    and filter alike keeps the oscillation around the valley floor.
    """

    def __init__(
        self, base: Optimizer, *, k: int = 20, beta: float = 0.95, gain: float = 0.5
    ) -> None:
        super().__init__(base)
        self.k, self.beta, self.gain, self.count = k, beta, gain, 0
        self.filter = self.copies()
        self.last = self.copies()

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        loss = self.gradient(closure)
        self.base.step()
        torch._foreach_lerp_(self.filter, self.tensors, 1.0 - self.beta)
        self.count += 1
        if self.count % self.k == 0:
            move = torch._foreach_sub(self.filter, self.last)
            torch._foreach_add_(self.tensors, move, alpha=self.gain)
            torch._foreach_add_(self.filter, move, alpha=self.gain)
            torch._foreach_copy_(self.last, self.filter)
        return loss
