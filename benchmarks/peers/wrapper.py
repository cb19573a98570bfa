"""The part that all peer wrappers share: an optimizer around an optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Closure", "PeerOptimizer", "swapped"]

Closure = Callable[[], Tensor]
"""Classic closure: clears gradients, runs forward and backward, returns the loss."""


class PeerOptimizer(Optimizer):
    """Shares parameter groups and state with the base; subclasses say what surrounds
    its step.

    Learning-rate schedulers drive the base. Checkpoints are out of scope: peers live
    for one benchmark run.
    """

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups = base.param_groups
        self.state = base.state
        self.tensors: list[Tensor] = [
            p for group in base.param_groups for p in group["params"] if p.requires_grad
        ]

    def copies(self) -> list[Tensor]:
        """A detached clone of every weight tensor."""
        return [p.detach().clone() for p in self.tensors]

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Set the weights in place."""
        torch._foreach_copy_(self.tensors, values)

    def gradient(self, closure: Closure) -> Tensor:
        """Run the closure with gradients on and return its detached loss."""
        with torch.enable_grad():
            return closure().detach()


@contextlib.contextmanager
def swapped(tensors: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Put ``values`` into the weights for the block, then the old bits back."""
    kept = [p.detach().clone() for p in tensors]
    with torch.no_grad():
        torch._foreach_copy_(tensors, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, kept)
