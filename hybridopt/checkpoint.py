"""Saving and restoring: the base's own state dict, with the hybrid state inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hybridopt.codec import decode, encode
from hybridopt.distributed import is_zero, keep_outer_state, restore_outer_state
from hybridopt.errors import CheckpointError
from hybridopt.run import Run
from hybridopt.telemetry import events
from hybridopt.weights.space import KEYS

__all__ = ["BLOB_KEY", "load_into", "require_state_dict", "save_into"]

BLOB_KEY = "hybrid"
"""Key in every parameter group; a string, which every checkpoint format carries."""


def require_state_dict(state: Any) -> None:
    """Refuse what no optimizer's ``state_dict()`` returned.

    Raises:
        CheckpointError: Not a mapping with ``state`` and ``param_groups``.
    """
    keys = sorted(map(str, state)) if isinstance(state, Mapping) else None
    if keys is None or not {"state", "param_groups"} <= set(keys):
        found = type(state).__name__ if keys is None else f"keys {keys}"
        raise CheckpointError(
            f"state_dict with {found}: must be a dict with 'state' and 'param_groups'. "
            "Pass what opt.state_dict() returned, not the whole training checkpoint."
        )


def save_into(run: Run) -> dict[str, Any]:
    """The base's state dict with the encoded run in every group.

    In every group, because distributed checkpointing files groups by parameter.
    """
    if run.enabled or any(BLOB_KEY in g for g in run.base.param_groups):
        text = encode(run.state_dict())
        for group in run.base.param_groups:
            group[BLOB_KEY] = text
    saved = run.base.state_dict()
    return keep_outer_state(run.base, saved, KEYS) if is_zero(run.base) else saved


def load_into(run: Run, rebuild: Callable[[], Run], state: dict[str, Any]) -> Run:
    """Load base and hybrid state; returns the run to go on with.

    Everything that can fail on the hybrid side fails before the base is touched; the
    base's own ``load_state_dict`` checks its groups before it writes.

    Raises:
        CheckpointError: The hybrid state is unreadable or does not fit.
        ValueError: The base refuses the groups.
    """
    text = next((g[BLOB_KEY] for g in state["param_groups"] if g.get(BLOB_KEY)), "")
    fresh = rebuild()
    if text:
        _fill(fresh, decode(text))
    if is_zero(run.base):
        restore_outer_state(run.base, state, KEYS)
    else:
        run.base.load_state_dict(state)
    if not run.config.enabled:
        return fresh
    for group in run.base.param_groups:
        group.setdefault(BLOB_KEY, "")
    fresh.space.restore()
    if not text:
        # A bare base's checkpoint: its state is trained, ours begins. With state
        # already there no zero step will create our keys later, so they come now.
        if run.base.state:
            fresh.space.forget()
        events.checkpoint_loaded(0, "bare base optimizer: prediction starts in warm-up")
        return fresh
    if run.base.state and not fresh.space.ready:
        fresh.space.allocate()
    events.checkpoint_loaded(fresh.counters.steps, fresh.controller.plan.phase.value)
    return fresh


def _fill(fresh: Run, state: dict[str, Any]) -> None:
    try:
        fresh.load_state_dict(state)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"hybrid state: {type(error).__name__}: {error}. It was saved by another "
            "version or configuration; load with the configuration it was saved with."
        ) from error
