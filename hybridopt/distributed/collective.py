"""One fused sum per observation, so that every rank decides from the same bits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hybridopt.errors import ConfigError
from hybridopt.protocols import Collective

__all__ = [
    "LocalCollective",
    "TorchCollective",
    "any_rank",
    "build_collective",
    "is_first",
    "reduction_weights",
    "require_same_tensors",
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
        self.rank = dist.get_rank(group)
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
    if _several_processes():
        return TorchCollective(None)
    return LocalCollective()


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduction_weights(shards: Sequence[float], world_size: int) -> Tensor:
    """(L, 1) weights that turn local sums into shares of the global sum.

    A tensor of s different shards is held by world_size / s ranks each, so every local
    sum counts s / world_size: 1 when all ranks hold different shards (FSDP), 1 /
    world_size when all hold the whole (DDP), in between for hybrid sharding.

    Args:
        shards: ``weights.local.shard_share`` per tensor.
        world_size: Number of ranks in the sum.
    """
    weights = torch.tensor(list(shards), dtype=torch.float64) / world_size
    return weights.unsqueeze(1)


def is_first(collective: Collective) -> bool:
    """Whether this is the first rank of the collective's group."""
    return not isinstance(collective, TorchCollective) or collective.rank == 0


def any_rank(collective: Collective, flag: bool) -> bool:
    """Whether the flag is set on some rank; the same answer on every rank.

    Every rank must call it: it is one all-reduce of one number.
    """
    if collective.world_size == 1:
        return flag
    count = collective.sum(torch.tensor([float(flag)], dtype=torch.float64))
    return bool(count[0] > 0.0)


def require_same_tensors(
    collective: Collective, shapes: Sequence[Sequence[int]]
) -> None:
    """Make sure that every rank wraps the same list of parameters; one all-reduce.

    Sums over ranks pair tensors by their place in the list. Different lists would hang
    or, worse, mix statistics of different tensors.

    Args:
        collective: The ranks that have to agree.
        shapes: Global shape of every parameter, in group order.

    Raises:
        ConfigError: On every rank, when one differs; or when the process group was
            created after this optimizer, which then takes itself to be alone.
    """
    if collective.world_size == 1:
        if isinstance(collective, LocalCollective) and _several_processes():
            raise ConfigError(
                "process_group=None: torch.distributed was initialized after this "
                "optimizer was built, so its ranks could not agree. Call "
                "init_process_group first, or pass process_group=."
            )
        return
    # With x a checksum per rank, all are equal if and only if the mean of x^2 is the
    # square of the mean; the tolerance is for rounding on many ranks.
    text = ";".join(",".join(map(str, shape)) for shape in shapes)
    checksum = float(zlib.crc32(text.encode()) & 0xFFFFFF)
    sums = collective.sum(torch.tensor([checksum, checksum**2], dtype=torch.float64))
    mean = float(sums[0]) / collective.world_size
    spread = float(sums[1]) / collective.world_size - mean**2
    if spread > 1e-9 * mean**2:
        raise ConfigError(
            f"base_optimizer of {len(shapes)} parameter tensors on this rank: all "
            "ranks must wrap the same list. Around a ZeroRedundancyOptimizer "
            "use HybridPredictOptimizer(ZeroRedundancyOptimizer(...)), not the reverse."
        )
