"""The base optimizer's own step and the predicted move behind it, in one pass.

theta' = base(theta) + scale (c_0 (base(theta) - theta) + sum_j c_{j+1} b_j), where
base is one AdamW or SGD step. For bases whose update is known, this saves the pass that
``Ops.apply`` makes. AdamW follows torch's fused implementation (decoupled weight decay,
Loshchilov and Hutter 2019, arXiv 1711.05101), SGD follows ``torch.optim.SGD``.

Nothing is checked for NaN: the gradient has been judged before any weight moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridopt.kernels.flat import wide
from hybridopt.protocols import Ops

__all__ = ["AdamWStep", "BaseStep", "BaseTensors", "SGDStep", "fused_move"]


@dataclass(frozen=True, slots=True)
class BaseTensors:
    """What one fused step reads and writes: lists of L local tensors each."""

    parameters: Sequence[Tensor]
    """Weights, written."""
    gradients: Sequence[Tensor]
    first: Sequence[Tensor]
    """exp_avg or momentum_buffer, written; the weights' dtype."""
    second: Sequence[Tensor] = ()
    """exp_avg_sq, written; empty for SGD."""
    directions: Sequence[Sequence[Tensor]] = ()
    """J lists of directions beyond the step's own displacement."""


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """Hyperparameters of one AdamW step, no AMSGrad."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    count: int
    """t, steps including this one; at least 1."""

    def moments(self, tensors: BaseTensors) -> tuple[Sequence[Tensor], ...]:
        """The state lists that the step updates."""
        return (tensors.first, tensors.second)

    def numbers(self) -> tuple[float, ...]:
        """rate, decay, first, second, root, eps as the kernel takes them."""
        rate = self.lr / (1 - self.beta1**self.count)
        root = math.sqrt(1 - self.beta2**self.count)
        decay = self.lr * self.weight_decay
        return (rate, decay, self.beta1, self.beta2, root, self.eps)

    def move(self, old: Tensor, gradient: Tensor, moments: Sequence[Tensor]) -> Tensor:
        """New weights; ``moments`` are updated in place. All in working precision."""
        rate, decay, beta1, beta2, root, eps = self.numbers()
        first, second = moments
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second.sqrt() / root).add_(eps)
        return (old - decay * old).addcdiv_(first, denominator, value=-rate)


@dataclass(frozen=True, slots=True)
class SGDStep:
    """Hyperparameters of one SGD step with momentum."""

    lr: float
    momentum: float
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    starts: bool = False
    """Whether the momentum buffer is new (zeros); its first gradient counts in full."""

    def moments(self, tensors: BaseTensors) -> tuple[Sequence[Tensor], ...]:
        """The state lists that the step updates."""
        return (tensors.first,)

    def numbers(self) -> tuple[float, ...]:
        """rate, decay, first, second, root, eps as the kernel takes them."""
        share = 1.0 if self.starts else 1.0 - self.dampening
        nesterov = 1.0 if self.nesterov else 0.0
        return (self.lr, self.weight_decay, self.momentum, share, nesterov, 0.0)

    def move(self, old: Tensor, gradient: Tensor, moments: Sequence[Tensor]) -> Tensor:
        """New weights; ``moments`` are updated in place. All in working precision."""
        rate, decay, momentum, share, nesterov, _ = self.numbers()
        gradient = gradient + decay * old
        moments[0].mul_(momentum).add_(gradient, alpha=share)
        push = gradient + momentum * moments[0] if nesterov else moments[0]
        return old - rate * push


BaseStep = AdamWStep | SGDStep


@torch.no_grad()
def fused_move(
    ops: Ops,
    tensors: BaseTensors,
    step: BaseStep,
    coefficients: Tensor,
    scale: float = 1.0,
) -> None:
    """Make one base step and the predicted move behind it.

    Args:
        ops: Its backend runs the step; ``torch`` in several passes.
        tensors: What is read and written.
        step: Which base, with its hyperparameters.
        coefficients: (L, 1 + J) float32: gain on the step's own displacement, then one
            factor per direction. A zero leaves its direction unread.
        scale: Share of the predicted move that this call makes.

    Cost on ``cupy``: one pass. fp32 AdamW without directions: 28 bytes per weight, what
    torch's fused AdamW moves; each bf16 direction adds 2.
    """
    kernel = getattr(ops, "base_move", None)
    if kernel is not None and kernel(tensors, step, coefficients, scale):
        return
    rows = coefficients.detach().to("cpu", torch.float32) * scale
    lists = zip(
        tensors.parameters,
        tensors.gradients,
        zip(*step.moments(tensors), strict=True),
        rows.tolist(),
        strict=True,
    )
    for index, (theta, gradient, moments, row) in enumerate(lists):
        precision = wide(theta)
        old = theta.to(precision)
        working = [m.to(precision) for m in moments]
        new = step.move(old, gradient.to(precision), working)
        delta = row[0] * (new - old) if row[0] else torch.zeros_like(new)
        for b, k in zip(tensors.directions, row[1:], strict=True):
            if k:
                delta.add_(b[index].to(precision), alpha=k)
        for moment, result in zip(moments, working, strict=True):
            moment.copy_(result)
        theta.copy_(new + delta)
