"""This rank's part of a parameter, as a plain real tensor that shares its memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["local", "same_kind", "shard_share"]


def local(tensor: Tensor) -> Tensor:
    """The local shard, detached, complex numbers as pairs; writes reach the original.

    A shard may be empty; it still takes part in every collective.
    """
    shard = getattr(tensor, "_local_tensor", None)
    plain = tensor.detach() if shard is None else shard.detach()
    return torch.view_as_real(plain) if plain.is_complex() else plain


def same_kind(parameters: Sequence[Tensor], rows: Sequence[int]) -> list[list[int]]:
    """Group ``rows`` by the device and dtype of their parameters, order kept."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for parameter, row in zip(parameters, rows, strict=True):
        kinds.setdefault((parameter.device, parameter.dtype), []).append(row)
    return list(kinds.values())


def shard_share(tensor: Tensor) -> float:
    """What to multiply a local sum by so that the sum over all ranks is the whole.

    1 for a tensor sharded over every rank; 1/k when k ranks hold the same shard; 1 over
    the world size, marked as 0.0 here, for a tensor that every rank holds whole.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return 0.0
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    replicas = 1
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            replicas *= mesh.size(dimension)
    return 1.0 / replicas
