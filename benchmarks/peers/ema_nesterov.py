"""EMA-Nesterov: every base step starts from a point ahead along the mean update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure, PeerOptimizer

__all__ = ["EMANesterov"]


class EMANesterov(PeerOptimizer):
    """With A the base optimizer and m an EMA of displacements:

        x' = A(x + beta_t m);  m' = gamma m + (1 - gamma) (x' - x).

    beta_t = beta * lr_t / max lr within [start, stop) steps, else 0.
    Source: arXiv 2605.25395; gamma 0.99, beta 0.6 and a window of about 15 to 75 % of
    the run are the values of its public Muon entry. The forward and backward run at
    the point ahead, so the cost per step is that of the base.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        beta: float = 0.6,
        gamma: float = 0.99,
        window: tuple[int, int] = (0, 1 << 62),
    ) -> None:
        super().__init__(base)
        self.beta, self.gamma, self.window = beta, gamma, window
        self.count, self.largest_lr = 0, 0.0
        self.mean = [torch.zeros_like(p) for p in self.copies()]

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        before = self.copies()
        rate = float(self.base.param_groups[0]["lr"])
        self.largest_lr = max(self.largest_lr, rate)
        if self.window[0] <= self.count < self.window[1] and self.largest_lr > 0:
            ahead = self.beta * rate / self.largest_lr
            torch._foreach_add_(self.tensors, self.mean, alpha=ahead)
        loss = self.gradient(closure)
        self.base.step()
        displacement = torch._foreach_sub(self.tensors, before)
        torch._foreach_lerp_(self.mean, displacement, 1.0 - self.gamma)
        self.count += 1
        return loss
