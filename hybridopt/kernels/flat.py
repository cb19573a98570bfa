"""Shared by the torch backend: packing few weights, sums over any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

__all__ = [
    "dot",
    "flat",
    "groups",
    "pack",
    "precision_of",
    "segment_sums",
    "uniform",
    "wide",
    "wide_of",
]

_PACK_LIMIT = 1 << 15
"""Weights up to which packing beats tensor by tensor on a CPU."""
_GROUP_LIMIT = 1 << 24
"""Weights per group of the foreach way; bounds each temporary to 64 MiB of float32."""
_DOT_LIMIT = 1 << 30
"""BLAS counts in 32 bits."""


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


def pack(lists: Sequence[Sequence[Tensor]], precision: torch.dtype) -> Tensor | None:
    """(len(lists), n) matrix of the flattened lists if that is cheaper, else None."""
    first = lists[0]
    if len(first) == 0 or first[0].device.type != "cpu":
        return None
    total = 0
    for t in first:
        total += t.numel()
    if total > _PACK_LIMIT:
        return None
    joined = [t for tensors in lists for t in tensors]
    for t in joined:
        if t.dtype != precision:
            joined = [t.to(precision) for t in joined]
            break
    packed: Tensor = _flatten_dense_tensors(joined)  # type: ignore[no-untyped-call]
    return packed.view(len(lists), total)


def segment_sums(products: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """(R, n) products to (L, R) sums over each tensor's columns.

    One sum per tensor, not a cumulative sum or a product with an indicator matrix: NaN
    in one tensor must not reach the sums of another.
    """
    parts = products.split_with_sizes([t.numel() for t in tensors], 1)
    return torch.stack([p.sum(1) for p in parts])


def flat(tensor: Tensor, precision: torch.dtype) -> Tensor:
    """The tensor as a vector of the given precision; a view where possible."""
    return tensor.reshape(-1).to(precision)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two flat tensors of any length, as a 0-dim tensor."""
    if left.numel() <= _DOT_LIMIT:
        return torch.dot(left, right)
    parts = zip(
        torch.split(left, _DOT_LIMIT), torch.split(right, _DOT_LIMIT), strict=True
    )
    return torch.stack([torch.dot(a, b) for a, b in parts]).sum()


def groups(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Runs of tensors with at most ``_GROUP_LIMIT`` weights, or one larger tensor."""
    start, total = 0, 0
    for index, t in enumerate(tensors):
        total += t.numel()
        if total > _GROUP_LIMIT and index > start:
            yield slice(start, index)
            start, total = index, t.numel()
    yield slice(start, len(tensors))
