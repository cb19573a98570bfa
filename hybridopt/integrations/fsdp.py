"""FSDP2 in loops that run a forward on predicted steps.

``HybridPredictOptimizer(base, model=model)`` needs nothing from here: it releases the
gathered weights itself before it moves the sharded ones. A loop that runs a forward
without a backward on its own, without having passed the model, calls
``release_unsharded(model)`` behind that forward.
"""

from hybridopt.distributed import release_unsharded

__all__ = ["release_unsharded"]
