"""Whether there are gradients that a step can be made of."""

from __future__ import annotations

from hybridopt.distributed import any_rank
from hybridopt.hooks import without_global_hooks
from hybridopt.run import Run
from hybridopt.weights.local import local

__all__ = ["has_gradients", "has_work"]


def has_gradients(run: Run, stale_too: bool) -> bool:
    """Whether there are gradients to step on.

    Args:
        run: Read.
        stale_too: On a real step any will do; a predicted step yields only to
            fresh ones, since those of the last real step may still be there.
    """
    if stale_too:
        return any(p.grad is not None for p in run.space.parameters())
    return run.fresh_gradients() and _not_all_zero(run)


def has_work(run: Run) -> bool:
    """Whether a ``step()`` without closure is a training step at all.

    Distributed checkpointing steps once with zero gradients and a zero learning
    rate to fill the base's state: that reaches the base and counts as nothing.
    """
    if any(p.grad is not None for p in run.space.parameters()):
        if any(float(g["lr"]) != 0.0 for g in run.base.param_groups):
            run.counters.backward_calls += 1
            return True
        if _not_all_zero(run):
            run.counters.backward_calls += 1
            return True
    with without_global_hooks():
        run.base.step()
    if not run.space.ready:
        run.space.allocate()
    return False


def _not_all_zero(run: Run) -> bool:
    gradients = [p.grad for p in run.space.parameters() if p.grad is not None]
    found = any(bool(local(g).count_nonzero()) for g in gradients)
    # A rank's shards may be empty or zero where the gradient is not.
    return any_rank(run.collective, found) if run.sharded else found
