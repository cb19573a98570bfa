"""Directions and displacements as lists in row order, in their parameters' shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.weights.buckets import Bucket

__all__ = ["add", "combine", "displacements"]


def combine(buckets: Sequence[Bucket], coefficients: Tensor) -> list[Tensor]:
    """sum_j coefficients[l, j] b_jl for every tensor of the buckets, as new tensors."""
    found: dict[int, Tensor] = {}
    for bucket in buckets:
        for place, row in enumerate(bucket.rows):
            parts = [
                float(coefficients[row, column]) * direction[place].float()
                for column, direction in enumerate(bucket.basis)
            ]
            found[row] = bucket.shaped(place, torch.stack(parts).sum(0))
    return [found[row] for row in sorted(found)]


def displacements(buckets: Sequence[Bucket]) -> list[Tensor]:
    """The step of every tensor of the buckets; not copies."""
    found: dict[int, Tensor] = {}
    for bucket in buckets:
        for place, row in enumerate(bucket.rows):
            found[row] = bucket.shaped(place, bucket.steps[place])
    return [found[row] for row in sorted(found)]


def add(buckets: Sequence[Bucket], tensors: Sequence[Tensor]) -> None:
    """theta_l += tensor_l for every tensor of the buckets."""
    rows = sorted(row for b in buckets for row in b.rows)
    place = {row: index for index, row in enumerate(rows)}
    for bucket in buckets:
        parts = [
            tensors[place[row]].to(p.device, p.dtype).view(p.shape)
            for row, p in zip(bucket.rows, bucket.parameters, strict=True)
        ]
        torch._foreach_add_(bucket.parameters, parts)
