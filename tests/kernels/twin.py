"""Literal float64 twins of the four operations, one weight at a time in spirit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (7, 5), (8, 16), (2, 0, 3))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().to("cpu", torch.float64).clone() for t in tensors]


def observe(gradients: Sequence[Tensor], basis: Sequence[Sequence[Tensor]]) -> Tensor:
    g, bs = wide(gradients), [wide(b) for b in basis]
    rows = [
        [(g[i] * g[i]).sum()]
        + [(g[i] * b[i]).sum() for b in bs]
        + [(b[i] * b[i]).sum() for b in bs]
        for i in range(len(g))
    ]
    return torch.tensor(rows, dtype=torch.float64).view(len(g), 1 + 2 * len(bs))


def advance(
    parameters: Sequence[Tensor],
    anchor: Sequence[Tensor],
    lag: Sequence[Tensor],
    beta: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """New s and v in float64, not yet rounded to what stores them."""
    s = [p - a for p, a in zip(wide(parameters), wide(anchor), strict=True)]
    v = [beta * (x + y) for x, y in zip(wide(lag), s, strict=True)]
    return s, v


def apply(
    parameters: Sequence[Tensor],
    basis: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Deltas and new weights in float64."""
    deltas = []
    c = coefficients.detach().to("cpu", torch.float64) * scale
    for i, p in enumerate(wide(parameters)):
        delta = torch.zeros_like(p)
        for j, b in enumerate(basis):
            if c[i, j] != 0:
                delta = delta + c[i, j] * wide([b[i]])[0]
        deltas.append(delta)
    return deltas, [p + d for p, d in zip(wide(parameters), deltas, strict=True)]


def tensors(
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    seed: int,
    device: str = "cpu",
) -> list[Tensor]:
    """Random tensors; ``dtypes`` repeat along the list."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator).to(device, dtypes[i % len(dtypes)])
        for i, s in enumerate(shapes)
    ]


def transposed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Equal tensors whose memory is strided where they have two dimensions or more."""
    return [t.mT.contiguous().mT if t.dim() > 1 else t.clone() for t in tensors]
