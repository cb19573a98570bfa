"""How ranks agree; ``torch.distributed`` is the engine."""

from hybridopt.distributed.collective import (
    LocalCollective,
    TorchCollective,
    build_collective,
    reduction_weights,
)

__all__ = [
    "LocalCollective",
    "TorchCollective",
    "build_collective",
    "reduction_weights",
]
