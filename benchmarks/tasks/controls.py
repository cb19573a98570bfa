"""Adversarial controls: tasks on which a prediction of the next step cannot help.

The primary ones draw every batch anew from a fixed teacher, so that no run sees an
example twice and held-out loss falls as far as optimization goes. Their twins on 1400
digits overfit within N steps: there a faster optimizer is judged worse by held-out
loss, which is why the training objective is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.base import BatchTask, EpochOrder, Setting, batch_generator
from benchmarks.tasks.convnet import digits, evaluator

__all__ = [
    "make_jump",
    "make_jump_digits",
    "make_label_noise",
    "make_label_noise_digits",
    "make_minimax",
    "make_tiny_batch",
    "make_tiny_batch_digits",
]

Pair = tuple[Tensor, Tensor]
INPUTS, CLASSES = 64, 10
WIDTH = {"quick": 1024, "full": 1536, "gpu": 2048}
"""Width of the students of the teacher's stream: wide enough that a bare step costs
milliseconds, as training steps do."""
HELD_OUT = 1024


def _network(setting: Setting, width: int, depth: int = 2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(INPUTS, width), nn.GELU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(width, CLASSES)).to(setting.device)


@lru_cache(maxsize=1)
def _teacher() -> tuple[Tensor, Tensor]:
    """(inputs, hidden) and (hidden, classes) weights of a random network, fixed."""
    generator = batch_generator(-5, 0)
    first = torch.randn(INPUTS, 64, generator=generator) * (1.5 / INPUTS**0.5)
    return first, torch.randn(64, CLASSES, generator=generator) * (3.0 / 64**0.5)


def stream(size: int, generator: torch.Generator) -> Pair:
    """(size, inputs) Gaussian inputs and the classes that the teacher draws for them.

    Labels are drawn, not chosen: the least attainable loss is their entropy.
    """
    first, second = _teacher()
    x = torch.randn(size, INPUTS, generator=generator)
    logits = torch.tanh(x @ first) @ second
    draw = torch.rand(size, CLASSES, generator=generator).clamp_min(1e-9)
    return x, (logits - (-draw.log()).log()).argmax(1)


def _streamed(
    setting: Setting,
    batch: int,
    labels: Callable[[Tensor, torch.Generator], Tensor] = lambda y, _: y,
    judged: Callable[[Tensor], Tensor] = lambda y: y,
    on_step: Callable[[int, int], None] | None = None,
) -> BatchTask[Pair]:
    """A student of the teacher's stream.

    Args:
        setting: Where and how large.
        batch: Examples per batch.
        labels: What becomes of a training batch's labels.
        judged: What becomes of the held-out ones.
        on_step: As for ``BatchTask``.
    """
    model = _network(setting, WIDTH[setting.scale], depth=3)
    held_x, held_y = stream(HELD_OUT, batch_generator(-6, 0))
    held_x, held_y = held_x.to(setting.device), held_y.to(setting.device)

    def rows(index: int) -> Pair:
        generator = batch_generator(setting.seed, index)
        x, y = stream(batch, generator)
        y = labels(y, generator)
        return x.to(setting.device), y.to(setting.device)

    def loss(pair: Pair) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    def evaluate() -> float:
        value: float = evaluator(model, held_x, judged(held_y))()
        return value

    count = max(16, 512 // batch)
    return BatchTask(model, loss, rows, evaluate, on_step, objective_batches=count)


def make_tiny_batch(setting: Setting) -> BatchTask[Pair]:
    """Batches of 2; meant for a rate at the edge of stability."""
    return _streamed(setting, 2)


def make_label_noise(setting: Setting) -> BatchTask[Pair]:
    """Labels are replaced at random in 60 % of all draws; held-out ones are clean."""

    def noisy(y: Tensor, generator: torch.Generator) -> Tensor:
        wrong = torch.rand(len(y), generator=generator) < 0.6
        return torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)

    return _streamed(setting, 32, noisy)


def make_jump(setting: Setting) -> BatchTask[Pair]:
    """Labels are renamed half-way through the schedule, in training and held out.

    What was learned before the jump is worth nothing to the head and something to the
    layers below.
    """
    switch = _Renaming()
    return _streamed(setting, 64, lambda y, _: switch(y), switch, switch.on_step)


class _Renaming:
    """Class k becomes k + 3 from the middle of the schedule on."""

    def __init__(self) -> None:
        self.now = False

    def on_step(self, step: int, total_steps: int) -> None:
        self.now = 2 * step >= total_steps

    def __call__(self, values: Tensor) -> Tensor:
        return (values + 3) % CLASSES if self.now else values


def _digits(
    setting: Setting,
    batch: int,
    labels: Callable[[Tensor, int], Tensor] = lambda y, _: y,
    judged: Callable[[Tensor], Tensor] = lambda y: y,
    on_step: Callable[[int, int], None] | None = None,
) -> BatchTask[Pair]:
    x, y, held_x, held_y = (t.to(setting.device) for t in digits())
    model = _network(setting, 64)
    order = EpochOrder(len(x), batch, setting.seed)

    def rows(index: int) -> Pair:
        chosen = order(index).to(x.device)
        return x[chosen], labels(y[chosen], index)

    def loss(pair: Pair) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    def evaluate() -> float:
        value: float = evaluator(model, held_x, judged(held_y))()
        return value

    # All of it: an epoch's batches.
    count = len(x) // batch
    return BatchTask(model, loss, rows, evaluate, on_step, objective_batches=count)


def make_tiny_batch_digits(setting: Setting) -> BatchTask[Pair]:
    """1400 digits in batches of 2."""
    return _digits(setting, 2)


def make_label_noise_digits(setting: Setting) -> BatchTask[Pair]:
    """1400 digits whose labels are replaced at random in 60 % of all draws."""

    def noisy(y: Tensor, index: int) -> Tensor:
        generator = batch_generator(setting.seed + 7_919, index)
        wrong = torch.rand(len(y), generator=generator) < 0.6
        random = torch.randint(10, y.shape, generator=generator)
        return torch.where(wrong.to(y.device), random.to(y.device), y)

    return _digits(setting, 32, noisy)


def make_jump_digits(setting: Setting) -> BatchTask[Pair]:
    """1400 digits whose labels are renamed half-way through the schedule."""
    switch = _Renaming()
    return _digits(setting, 64, lambda y, _: switch(y), switch, switch.on_step)


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


class GameTask(BatchTask[Tensor]):
    """Its loss is no measure of progress, so it has no training objective."""

    objective = None  # type: ignore[assignment]


def make_minimax(setting: Setting) -> BatchTask[Tensor]:
    """A noisy two-player game: the gradient field turns, and its loss is no measure of
    progress, as with generative adversarial networks. Judged by the mean squared
    distance from the equilibrium.
    """
    size = {"quick": 1024, "full": 1536, "gpu": 2048}[setting.scale]
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

    return GameTask(model, model, noise, evaluate)
