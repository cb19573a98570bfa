"""Made-up observations whose alignments are what the test says."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hybridopt.config import MLP, RSSM, HybridConfig, Linear, Prior
from hybridopt.dynamics import LearnedPredictor, PriorPredictor, build_predictor
from hybridopt.types import Move, Observation
from tests.parts import move

KINDS = (Prior(), Linear(), MLP(), RSSM())
NAMES = [type(kind).__name__ for kind in KINDS]
SIZES = (1200, 30, 900, 30, 450)
NDIMS = (2, 1, 4, 1, 3)


def observation(step: int, alignment: Tensor, **changes: object) -> Observation:
    """One real step with the given (L, 2) alignments and norms that vary over time."""
    size = len(alignment)
    index = torch.arange(size, dtype=torch.float64)
    gradient_sq = 0.5 + index + 0.1 * math.sin(step)
    # So short that the loss, which follows no gradient here, breaks no promise.
    basis_sq = 1e-10 * torch.stack((1.0 + 0.2 * index, 3.0 + 0.1 * index), 1)
    dots = -alignment * (gradient_sq.unsqueeze(1) * basis_sq).sqrt()
    values: dict[str, object] = {
        "step": step,
        "loss": 2.0 - 0.002 * step + 0.01 * math.cos(1.7 * step),
        "gradient_norm": float(gradient_sq.sum().sqrt()),
        "finite": True,
        "gradient_sq": gradient_sq,
        "dots": dots,
        "basis_sq": basis_sq,
        "learning_rate": 1e-3,
        "lr_ratio": 1.0,
        "move": tiny_move(size) if step > 3 else None,
    }
    return Observation(**(values | changes))  # type: ignore[arg-type]


def tiny_move(size: int) -> Move:
    """Worth a fifth of a step, and so short that it breaks no promise of the loss."""
    coefficients = torch.zeros(size, 2, dtype=torch.float64)
    coefficients[:, 0] = 0.1
    return move(coefficients, progress=0.2, slope=1e-3)


def noisy(count: int, size: int, seed: int = 0) -> list[Observation]:
    """Independent alignments around a small positive mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, size, 2)
    every = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 + 0.05
    return [observation(i, every[i]) for i in range(count)]


def waves(count: int, size: int, seed: int = 0) -> list[Observation]:
    """Alignments that swing with period 4, which a running mean cannot foresee."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, size, 2), generator=generator, dtype=torch.float64)
    phase = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    return [
        observation(i, 0.3 * torch.cos(math.pi / 2 * (i + phase)) + 0.03 * noise[i])
        for i in range(count)
    ]


def slopes(size: int, step: int = 0) -> Tensor:
    """First-order decreases per tensor, one of them uphill."""
    values = torch.arange(1, size + 1, dtype=torch.float64) * 1e-3
    values[step % size] *= -0.5
    return values


def predictor(
    kind: Prior | Linear | MLP | RSSM, **changes: object
) -> PriorPredictor | LearnedPredictor:
    """A predictor for the five tensors of ``SIZES``, already moving."""
    config = HybridConfig(predictor=kind).replace(**changes)
    made = build_predictor(config, SIZES, NDIMS, 7)
    made.moving = True
    return made


def flatten(state: object, path: str = "") -> dict[str, object]:
    """Leaves of nested dicts and lists by path; tensors as bytes of their values."""
    if isinstance(state, dict):
        items = [(f"{path}.{key}", value) for key, value in state.items()]
    elif isinstance(state, list):
        items = [(f"{path}[{index}]", value) for index, value in enumerate(state)]
    elif isinstance(state, Tensor):
        return {path: (state.dtype, tuple(state.shape), repr(state.tolist()))}
    else:
        return {path: repr(state)}
    leaves: dict[str, object] = {}
    for name, value in items:
        leaves |= flatten(value, name)
    return leaves


def every_tensor(state: object, visit: Callable[[Tensor], None]) -> None:
    """Call ``visit`` on each tensor of a state dictionary."""
    if isinstance(state, Tensor):
        visit(state)
    elif isinstance(state, dict):
        for value in state.values():
            every_tensor(value, visit)
    elif isinstance(state, list):
        for value in state:
            every_tensor(value, visit)
