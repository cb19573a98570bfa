"""A rank's part of a parameter, as a plain real tensor that shares its memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["local", "shard_share"]


def local(tensor: Tensor) -> Tensor:
    """The local shard, complex numbers as pairs; writes reach the original.

    A shard may be empty; it still takes part in every collective. To be used under
    ``no_grad`` only: a plain tensor is returned as it is, because a detached alias per
    parameter and step would cost more than the arithmetic on small models.
    """
    plain = getattr(tensor, "_local_tensor", tensor)
    return torch.view_as_real(plain.detach()) if plain.is_complex() else plain


def shard_share(tensor: Tensor) -> float:
    """How many different shards make up the whole tensor; 1 where ranks hold it whole.

    Ranks that hold copies of one shard count once: for a mesh of r replicas times s
    shards this is s. ``distributed.reduction_weights`` turns it into the weight of a
    local sum.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return 1.0
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    shards = 1
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            shards *= mesh.size(dimension)
    return float(shards)


def shard_numel(tensor: Tensor) -> int:
    """Elements of the largest shard: what a rank needs room for, equal on all ranks.

    The local count is not: the last shards are shorter, or empty.
    """
    return -(-tensor.numel() // int(shard_share(tensor)))
