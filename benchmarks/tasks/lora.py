"""Low-rank adapters around frozen linear layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Adapted", "add_adapters"]


class Adapted(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen and B zero at first.

    Source: Hu et al. 2021, arXiv 2106.09685; alpha = 2 r.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2.0 * (x @ self.A.T) @ self.B.T


def add_adapters(model: nn.Module, rank: int) -> None:
    """Freeze the model and wrap each of its linear layers, in place."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, Adapted):
                setattr(module, name, Adapted(child, rank))
