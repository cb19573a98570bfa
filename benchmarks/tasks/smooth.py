"""Small smooth tasks on real or exact data, and their noisy twins.

``make(name, seed)`` builds one; deterministic given the seed, float32, CPU, a forward
and backward pass takes well under 2 ms on one core. Full-batch tasks have one loss
function for the whole run; the noisy twins draw a batch or a dropout mask per call and
exist to check that smooth-only methods keep out of their way.

Needs scikit-learn (digits, sample image); ``water`` also needs CoolProp or a table that
``python -m benchmarks fetch`` made with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NOISY", "OPTIONAL", "SMOOTH", "Task", "make", "steam_table"]

SMOOTH = ("poisson", "heat", "siren", "mlp_full", "logreg_full", "ae_full")
"""Full-batch tasks."""
OPTIONAL = ("water",)
"""Full-batch tasks with an extra dependency."""
NOISY = ("mlp", "mlp_512", "mlp_dropout", "logreg", "ae")
"""Tasks with a batch or a dropout mask per call."""


@dataclass(frozen=True)
class Task:
    """One training problem."""

    name: str
    model: nn.Module
    closure: Callable[[], Tensor]
    """Forward pass: the training loss with its graph; draws the next batch if noisy."""
    evaluate: Callable[[], float]
    """The task's own error, lower is better: against the exact solution, on held-out
    data, or the training loss where neither exists. Draws nothing."""
    full_batch: bool


def make(name: str, seed: int = 0, data: Path | None = None) -> Task:
    """Build a task; the seed sets initial weights and the order of batches.

    Args:
        name: One of ``SMOOTH``, ``OPTIONAL``, ``NOISY``.
        seed: Of weights and batches.
        data: Folder that may hold ``water.csv``.

    Raises:
        ValueError: Unknown name.
        ImportError: The task's data package is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match name:
            case "poisson":
                return _poisson()
            case "heat":
                return _heat()
            case "siren":
                return _siren()
            case "mlp_full":
                return _classifier(name, dense([64, 64, 64, 10], nn.GELU), None, seed)
            case "logreg_full":
                return _classifier(name, nn.Linear(64, 10), None, seed, 0.0)
            case "ae_full":
                return _autoencoder(name, None, seed)
            case "mlp":
                return _classifier(name, dense([64, 64, 64, 10], nn.GELU), 64, seed)
            case "mlp_512":
                return _classifier(name, dense([64, 64, 64, 10], nn.GELU), 512, seed)
            case "mlp_dropout":
                return _classifier(name, _dropout_net(), None, seed)
            case "logreg":
                return _classifier(name, nn.Linear(64, 10), 128, seed, 0.0)
            case "ae":
                return _autoencoder(name, 128, seed)
            case "water":
                return _water(data)
    known = ", ".join(SMOOTH + OPTIONAL + NOISY)
    raise ValueError(f"task {name!r}: unknown. Use one of {known}.")


class Sine(nn.Module):
    """sin(30 x), the activation of SIREN (Sitzmann et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30.0 * x)


def dense(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between each two."""
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(inner, outer)]
        layers += [activation()] if i < len(sizes) - 2 else []
    return nn.Sequential(*layers)


def _dropout_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.GELU(),
        nn.Dropout(0.1), nn.Linear(64, 10),
    )  # fmt: skip


def _linears(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def taylor(
    model: nn.Sequential, x: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, du and d2u along a direction, of a tanh network, carried forward by hand.

    Equal to two nested autograd passes at about a quarter of the time.
    """
    value, first = x, direction.expand_as(x)
    second = torch.zeros_like(x)
    layers = _linears(model)
    for i, layer in enumerate(layers):
        value = layer(value)
        first, second = first @ layer.weight.T, second @ layer.weight.T
        if i < len(layers) - 1:
            value = torch.tanh(value)
            slope = 1.0 - value * value
            second = slope * second - 2.0 * value * slope * first * first
            first = slope * first
    return value, first, second


def _poisson() -> Task:
    """Poisson: u'' = f on [-1, 1], u = sin(pi x) + 0.3 sin(4 pi x), 0 at both ends."""
    model = dense([1, 32, 32, 32, 1], nn.Tanh)
    x = torch.linspace(-1, 1, 256).view(-1, 1)
    points = torch.cat([x, torch.tensor([[-1.0], [1.0]])])
    exact = torch.sin(math.pi * x) + 0.3 * torch.sin(4 * math.pi * x)
    force = -(math.pi**2) * (
        torch.sin(math.pi * x) + 0.3 * 16 * torch.sin(4 * math.pi * x)
    )
    along = torch.ones(1)

    def closure() -> Tensor:
        value, _, second = taylor(model, points, along)
        inside = (second[:256] - force).square().mean() / 100.0
        return inside + 10.0 * value[256:].square().mean()

    @torch.no_grad()
    def evaluate() -> float:
        return float((model(x) - exact).norm() / exact.norm())

    return Task("poisson", model, closure, evaluate, True)


def _heat() -> Task:
    """u_t = u_xx / 20 on [-1, 1] x [0, 1], two modes that decay at their own rates."""
    model = dense([2, 32, 32, 32, 1], nn.Tanh)
    rate = 0.05

    def solution(p: Tensor) -> Tensor:
        x, t = p[:, :1], p[:, 1:]
        slow = torch.exp(-rate * math.pi**2 * t) * torch.sin(math.pi * x)
        fast = torch.exp(-rate * 9 * math.pi**2 * t) * torch.sin(3 * math.pi * x)
        return slow + 0.5 * fast

    xs, ts = torch.linspace(-1, 1, 20), torch.linspace(0, 1, 10)
    inside = torch.cartesian_prod(xs[1:-1], ts)
    ends = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), ts)
    start = torch.stack([torch.linspace(-1, 1, 40), torch.zeros(40)], 1)
    edge = torch.cat([ends, start])
    known = solution(edge)
    fine = torch.cartesian_prod(torch.linspace(-1, 1, 41), torch.linspace(0, 1, 21))
    exact = solution(fine)
    along_x, along_t = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    def closure() -> Tensor:
        _, _, u_xx = taylor(model, inside, along_x)
        _, u_t, _ = taylor(model, inside, along_t)
        equation = (u_t - rate * u_xx).square().mean()
        return equation + 10.0 * (model(edge) - known).square().mean()

    @torch.no_grad()
    def evaluate() -> float:
        return float((model(fine) - exact).norm() / exact.norm())

    return Task("heat", model, closure, evaluate, True)


def _siren() -> Task:
    """A 40 x 40 crop of a photograph as a function of its coordinates."""
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("china.jpg")[100:340:6, 100:340:6].tolist()
    target = (torch.tensor(pixels, dtype=torch.float32) / 255.0).view(-1, 3)
    axis = torch.linspace(-1, 1, 40)
    grid = torch.cartesian_prod(axis, axis)
    model = dense([2, 48, 48, 3], Sine)
    first, *others = _linears(model)
    with torch.no_grad():
        first.weight.uniform_(-1 / 2, 1 / 2)
        bound = math.sqrt(6 / 48) / 30
        for layer in others:
            layer.weight.uniform_(-bound, bound)

    def closure() -> Tensor:
        return (model(grid) - target).square().mean()

    @torch.no_grad()
    def evaluate() -> float:
        return float(closure())

    return Task("siren", model, closure, evaluate, True)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """1797 digits of 8 x 8 pixels in [0, 1], shuffled once and for all."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data.tolist(), dtype=torch.float32) / 16.0
    y = torch.tensor(digits.target.tolist())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def _batches(size: int, batch: int | None, seed: int) -> Callable[[], Tensor | slice]:
    """Index of the next batch; everything when ``batch`` is None."""
    if batch is None:
        return lambda: slice(0, size)
    generator = torch.Generator().manual_seed(seed + 1)
    return lambda: torch.randint(size, (batch,), generator=generator)


def _classifier(
    name: str, model: nn.Module, batch: int | None, seed: int, smoothing: float = 0.05
) -> Task:
    """Cross-entropy on 1000 digits, less the least that label smoothing allows."""
    x, y = _digits()
    draw = _batches(1000, batch, seed)
    hit, miss = 1 - 0.9 * smoothing, 0.1 * smoothing
    floor = -hit * math.log(hit) - (9 * miss * math.log(miss) if miss else 0.0)

    def closure() -> Tensor:
        i = draw()
        loss = F.cross_entropy(
            model(x[:1000][i]), y[:1000][i], label_smoothing=smoothing
        )
        return loss - floor

    @torch.no_grad()
    def evaluate() -> float:
        training = model.training
        model.eval()
        wrong = (model(x[1000:]).argmax(1) != y[1000:]).float().mean()
        model.train(training)
        return float(wrong)

    return Task(name, model, closure, evaluate, batch is None and "dropout" not in name)


def _autoencoder(name: str, batch: int | None, seed: int) -> Task:
    """Squared reconstruction error of 512 digits through 16 units."""
    x, _ = _digits()
    model = dense([64, 64, 16, 64, 64], nn.GELU)
    draw = _batches(512, batch, seed)

    def closure() -> Tensor:
        rows = x[:512][draw()]
        return (model(rows) - rows).square().mean()

    @torch.no_grad()
    def evaluate() -> float:
        return float((model(x[512:]) - x[512:]).square().mean())

    return Task(name, model, closure, evaluate, batch is None)


def steam_table() -> list[tuple[float, float, float, float]]:
    """Kelvin, log10 of pascal, J/kg, log of kg/m3 on a 32 x 32 grid, by CoolProp."""
    from CoolProp.CoolProp import PropsSI

    rows = []
    for i in range(32):
        for j in range(32):
            kelvin, log_pressure = 660 + 340 * i / 31, 6 + 1.7 * j / 31
            state = ("T", kelvin, "P", 10.0**log_pressure, "Water")
            enthalpy, density = PropsSI("H", *state), PropsSI("D", *state)
            rows.append((kelvin, log_pressure, enthalpy, math.log(density)))
    return rows


@lru_cache(maxsize=1)
def _steam(data: Path | None) -> tuple[Tensor, Tensor]:
    """(inputs, targets): temperature and log pressure to enthalpy and log density."""
    kept = None if data is None else data / "water.csv"
    if kept is not None and kept.exists():
        lines = kept.read_text("utf-8").splitlines()[1:]
        rows = [tuple(float(word) for word in line.split(",")) for line in lines]
    else:
        rows = list(steam_table())
    values = torch.tensor(rows, dtype=torch.float64)
    values = ((values - values.mean(0)) / values.std(0)).float()
    return values[:, :2], values[:, 2:]


def _water(data: Path | None) -> Task:
    """A surrogate of the equation of state of water above its critical temperature."""
    x, y = _steam(data)
    half = torch.arange(len(x)) % 2 == 0
    model = dense([2, 32, 32, 2], nn.Tanh)

    def closure() -> Tensor:
        return (model(x[half]) - y[half]).square().mean()

    @torch.no_grad()
    def evaluate() -> float:
        return float((model(x[~half]) - y[~half]).square().mean())

    return Task("water", model, closure, evaluate, True)
