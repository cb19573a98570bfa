"""This rank's part of a parameter, as a plain real tensor that shares its memory."""

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
