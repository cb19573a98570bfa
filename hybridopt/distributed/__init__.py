"""How ranks agree; ``torch.distributed`` is the engine."""

from hybridopt.distributed.collective import (
    LocalCollective,
    TorchCollective,
    any_rank,
    build_collective,
    is_first,
    reduction_weights,
    require_same_tensors,
)
from hybridopt.distributed.sharded import release_unsharded
from hybridopt.distributed.zero import is_zero, keep_outer_state, restore_outer_state

__all__ = [
    "LocalCollective",
    "TorchCollective",
    "any_rank",
    "build_collective",
    "is_first",
    "is_zero",
    "keep_outer_state",
    "reduction_weights",
    "release_unsharded",
    "require_same_tensors",
    "restore_outer_state",
]
