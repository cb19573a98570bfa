"""Shared by the torch backend: precisions, vectors, sums over any number of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "dot",
    "dots",
    "flat",
    "graphless",
    "groups",
    "pieces",
    "precision_of",
    "uniform",
    "vector",
    "wide",
    "wide_of",
]

_GROUP_LIMIT = 1 << 24
"""Weights per group of the foreach way; bounds each temporary to 64 MiB of float32."""
_DOT_LIMIT = 1 << 30
"""BLAS counts in 32 bits."""
_PIECE = 1 << 16
"""Weights per piece where the CPU has to convert: a piece's copy stays in the cache, a
whole tensor's copy would be faulted in page by page (four times as slow)."""


P = ParamSpec("P")
R = TypeVar("R")


def graphless(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.no_grad`` that costs nothing where gradients are off already."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def precision_of(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of sums: float64 as soon as one tensor is float64."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def wide(tensor: Tensor) -> torch.dtype:
    """The arithmetic precision of one tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide_of(tensor: Tensor) -> Tensor:
    """The tensor in its arithmetic precision; itself if it has it already."""
    return tensor.to(wide(tensor))


def uniform(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors share one dtype that is its own arithmetic precision."""
    kinds = {t.dtype for tensors in lists for t in tensors}
    return len(kinds) == 1 and kinds <= {torch.float32, torch.float64}


def flat(tensor: Tensor, precision: torch.dtype) -> Tensor:
    """The tensor as a vector of the given precision; a view where possible."""
    if tensor.dim() != 1:
        tensor = tensor.reshape(-1)
    return tensor if tensor.dtype is precision else tensor.to(precision)


def vector(tensor: Tensor, precision: torch.dtype) -> Tensor:
    """``flat``, but what the CPU would have to convert is left for ``dot``."""
    if precision is torch.float32 and tensor.device.type == "cpu":
        return tensor if tensor.dim() == 1 else tensor.reshape(-1)
    return flat(tensor, precision)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape side by side, piece by piece; views, where their layouts
    permit, else the tensors as they are.
    """
    if all([t.is_contiguous() for t in tensors]):
        return zip(*(torch.split(t.view(-1), _PIECE) for t in tensors), strict=True)
    return iter([tensors])


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two flat tensors of any length, as a 0-dim tensor.

    In float32 where one of them has less; then piece by piece.
    """
    if left.dtype is not right.dtype or left.dtype.itemsize < 4:
        terms = [torch.dot(a.float(), b.float()) for a, b in pieces(left, right)]
        return (
            torch.stack(terms).sum()
            if terms
            else left.new_zeros((), dtype=torch.float32)
        )
    if left.numel() <= _DOT_LIMIT:
        return torch.dot(left, right)
    parts = zip(
        torch.split(left, _DOT_LIMIT), torch.split(right, _DOT_LIMIT), strict=True
    )
    return torch.stack([torch.dot(a, b) for a, b in parts]).sum()


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Inner products of L pairs of flat tensors, as 0-dim tensors."""
    return list(map(dot, left, right))


def groups(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Runs of tensors with at most ``_GROUP_LIMIT`` weights, or one larger tensor."""
    start, total = 0, 0
    for index, t in enumerate(tensors):
        total += t.numel()
        if total > _GROUP_LIMIT and index > start:
            yield slice(start, index)
            start, total = index, t.numel()
    yield slice(start, len(tensors))
