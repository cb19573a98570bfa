"""One fused sum per observation, so that every rank decides from the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "LocalCollective",
    "TorchCollective",
    "build_collective",
    "reduction_weights",
]


class LocalCollective:
    """A single process: sums and broadcasts are the identity."""

    world_size = 1

    def sum(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values

    def broadcast(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values


class TorchCollective:
    """Sums over a process group of ``torch.distributed``."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)
        backend = str(dist.get_backend(group))
        # NCCL moves device tensors only; the values are a few hundred numbers.
        self._device = torch.device("cuda" if "nccl" in backend else "cpu")

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce in float64; the same bits on every rank.

        A sum of float64 numbers by all-reduce is computed once per element and then
        distributed (ring and tree alike), so no rank can round differently.
        """
        moved = values.to(self._device, torch.float64, copy=True)
        dist.all_reduce(moved, group=self.group)
        return moved.to(values.device, values.dtype)

    def broadcast(self, values: Tensor) -> Tensor:
        """The values of the group's first rank."""
        moved = values.to(self._device, copy=True)
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        dist.broadcast(moved, src=source, group=self.group)
        return moved.to(values.device)


def build_collective(
    group: dist.ProcessGroup | None,
) -> LocalCollective | TorchCollective:
    """The given process group, else the default one where several processes run."""
    if group is not None:
        return TorchCollective(group)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchCollective(None)
    return LocalCollective()


def reduction_weights(shares: Sequence[float], world_size: int) -> Tensor:
    """(L, 1) weights that turn local sums into shares of the global sum.

    Args:
        shares: ``weights.local.shard_share`` per tensor; 0.0 marks a tensor that every
            rank holds whole.
        world_size: Number of ranks in the sum.
    """
    weights = [share if share > 0.0 else 1.0 / world_size for share in shares]
    return torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
