"""Adversarial controls: tasks on which a prediction of the next step cannot help."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.base import BatchTask, EpochOrder, Setting, batch_generator
from benchmarks.tasks.convnet import digits, evaluator

__all__ = ["make_jump", "make_label_noise", "make_minimax", "make_tiny_batch"]

Pair = tuple[Tensor, Tensor]


def _classifier(setting: Setting, width: int = 64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 10),
        ).to(setting.device)


def make_tiny_batch(setting: Setting) -> BatchTask[Pair]:
    """Digits in batches of 2; meant for a rate at the edge of stability."""
    x, y, held_x, held_y = (t.to(setting.device) for t in digits())
    model = _classifier(setting)
    order = EpochOrder(len(x), 2, setting.seed)

    def rows(index: int) -> Pair:
        chosen = order(index).to(x.device)
        return x[chosen], y[chosen]

    def loss(pair: Pair) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    return BatchTask(model, loss, rows, evaluator(model, held_x, held_y))


def make_label_noise(setting: Setting) -> BatchTask[Pair]:
    """Digits whose labels are replaced at random in 60 % of all draws."""
    x, y, held_x, held_y = (t.to(setting.device) for t in digits())
    model = _classifier(setting)
    order = EpochOrder(len(x), 32, setting.seed)

    def rows(index: int) -> Pair:
        chosen = order(index).to(x.device)
        generator = batch_generator(setting.seed + 7_919, index)
        wrong = torch.rand(32, generator=generator) < 0.6
        random = torch.randint(10, (32,), generator=generator)
        labels = torch.where(wrong.to(y.device), random.to(y.device), y[chosen])
        return x[chosen], labels

    def loss(pair: Pair) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    return BatchTask(model, loss, rows, evaluator(model, held_x, held_y))


def make_jump(setting: Setting) -> BatchTask[Pair]:
    """Digits whose labels are renamed half-way through the schedule.

    The held-out loss is always that of the new names from then on, so what was learned
    before the jump is worth nothing to the head and something to the layers below.
    """
    x, y, held_x, held_y = (t.to(setting.device) for t in digits())
    model = _classifier(setting)
    order = EpochOrder(len(x), 64, setting.seed)
    renamed = {"now": False}

    def labels(values: Tensor) -> Tensor:
        return (values + 3) % 10 if renamed["now"] else values

    def on_step(step: int, total_steps: int) -> None:
        renamed["now"] = 2 * step >= total_steps

    def rows(index: int) -> Pair:
        chosen = order(index).to(x.device)
        return x[chosen], labels(y[chosen])

    def loss(pair: Pair) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    def evaluate() -> float:
        value: float = evaluator(model, held_x, labels(held_y))()
        return value

    return BatchTask(model, loss, rows, evaluate, on_step)


class _Reversed(torch.autograd.Function):
    """Identity forward, gradient times -1 backward (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class Game(nn.Module):
    """min over x, max over y of x'Ay + mu/2 |x|^2 - mu/2 |y|^2, equilibrium at zero."""

    def __init__(self, size: int, strength: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(size))
        self.y = nn.Parameter(torch.randn(size))
        self.strength = strength
        self.register_buffer("A", torch.randn(size, size) / size**0.5)

    def forward(self, noise: Tensor) -> Tensor:
        y = _Reversed.apply(self.y)
        coupling = self.A + noise
        bilinear = self.x @ coupling @ y
        return bilinear + self.strength / 2 * (self.x.square().sum() - y.square().sum())


def make_minimax(setting: Setting) -> BatchTask[Tensor]:
    """A noisy two-player game: the gradient field turns, and its loss is no measure of
    progress, as with generative adversarial networks. Judged by the mean squared
    distance from the equilibrium.
    """
    size = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = Game(size, strength=0.3).to(setting.device)

    def noise(index: int) -> Tensor:
        generator = batch_generator(setting.seed, index)
        draw = torch.randn(size, size, generator=generator)
        return 0.3 * (draw / size**0.5).to(setting.device)

    @torch.no_grad()
    def evaluate() -> float:
        return float((model.x.square().mean() + model.y.square().mean()) / 2)

    return BatchTask(model, model, noise, evaluate)
