"""Small training problems whose every batch is known, for tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

BASES: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    # A rate so low that moves soon consume steps.
    "adamw_slow": lambda p: torch.optim.AdamW(p, lr=2e-4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@dataclass
class Problem:
    """A model and a fixed sequence of batches."""

    model: nn.Module
    batches: list[tuple[torch.Tensor, torch.Tensor]]

    def loss(self, index: int) -> torch.Tensor:
        x, y = self.batches[index % len(self.batches)]
        return nn.functional.mse_loss(self.model(x), y)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def twin(self) -> Problem:
        return Problem(copy.deepcopy(self.model), self.batches)


def regression(
    seed: int = 0, batches: int = 400, batch_norm: bool = False, noise: float = 0.3
) -> Problem:
    """Noisy minibatch regression with a small MLP."""
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(6, 16)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(16))
    layers += [nn.Tanh(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    truth = torch.randn(6, 3, generator=g)
    data = []
    for _ in range(batches):
        x = torch.randn(16, 6, generator=g)
        y = torch.sin(x @ truth) + noise * torch.randn(16, 3, generator=g)
        data.append((x, y))
    return Problem(model, data)


def train(problem: Problem, optimizer, steps: int, start: int = 0) -> list[float]:
    """Forward-closure loop; the i-th call gets the i-th batch. Returns the losses."""
    losses = []
    for i in range(start, start + steps):
        loss = optimizer.step(lambda i=i: problem.loss(i))
        losses.append(float(loss))
    return losses


def spoiled(problem: Problem, optimizer, step: int, where: str, bad: float):
    """A classic closure whose loss, or one gradient of which, is ``bad``."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        if where == "loss":
            return loss * bad
        next(problem.model.parameters()).grad.view(-1)[0] = bad
        return loss

    return closure


def train_bare(problem: Problem, base: torch.optim.Optimizer, steps: int) -> None:
    """The loop that every torch user writes."""
    for i in range(steps):
        base.zero_grad()
        problem.loss(i).backward()
        base.step()


def assert_same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), (a - b).abs().max()
