"""Hypergradient descent on the learning rate, global or per tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.peers.wrapper import Closure, PeerOptimizer

__all__ = ["Hypergradient"]


class Hypergradient(PeerOptimizer):
    """Multiplies the base's update by s, which follows the alignment of the gradient
    with the previous update u:

        s <- s (1 + rate * <-g, u> / (||g|| ||u||));  theta += s * (base displacement).

    The multiplicative, normalized form of Baydin et al. 2018, arXiv 1703.04782
    (its Adam-HD when the base is Adam); ``per_tensor`` keeps one s per tensor
    (Almeida et al. 1999). The displacement includes decoupled weight decay.
    """

    def __init__(
        self, base: Optimizer, *, rate: float = 0.02, per_tensor: bool = False
    ) -> None:
        super().__init__(base)
        self.rate, self.per_tensor = rate, per_tensor
        self.scale = torch.ones(len(self.tensors), device=self.tensors[0].device)
        self.update: list[Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        loss = self.gradient(closure)
        if self.update is not None:
            self.scale *= 1.0 + self.rate * self._alignment(self.update)
        before = self.copies()
        self.base.step()
        self.update = list(torch._foreach_sub(self.tensors, before))
        for p, start, move, s in zip(
            self.tensors, before, self.update, self.scale, strict=True
        ):
            torch.addcmul(start, move, s.to(p.dtype), out=p)
        return loss

    def _alignment(self, update: list[Tensor]) -> Tensor:
        """(L,) cosine of -g with the last update; one shared value unless
        ``per_tensor``. A tensor without a gradient counts as orthogonal.
        """
        pairs = [
            (torch.zeros_like(u) if p.grad is None else p.grad, u)
            for p, u in zip(self.tensors, update, strict=True)
        ]
        dots = torch.stack([-(g * u).sum() for g, u in pairs])
        g_sq = torch.stack([g.square().sum() for g, _ in pairs])
        u_sq = torch.stack([u.square().sum() for _, u in pairs])
        if not self.per_tensor:
            dots, g_sq, u_sq = (v.sum().expand(len(pairs)) for v in (dots, g_sq, u_sq))
        return dots / (g_sq * u_sq).sqrt().clamp_min(1e-30)
