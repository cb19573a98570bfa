"""Checks on saved guard state, so that a bad checkpoint changes nothing."""

from __future__ import annotations

import math
from typing import Any

from hybridopt.config import DivergenceConfig
from hybridopt.errors import CheckpointError
from hybridopt.guard.statistics import MIN_OBSERVATIONS
from hybridopt.history import Window

__all__ = ["build_window", "expect_count", "expect_keys", "load_window", "mismatch"]


def build_window(config: DivergenceConfig) -> Window:
    """A window of the configured length, never too short for any statistics."""
    return Window(max(config.window_steps, MIN_OBSERVATIONS))


def mismatch(owner: str, rule: str) -> CheckpointError:
    """The error for state that ``owner`` cannot take in."""
    return CheckpointError(
        f"state of {owner!r}: {rule}. "
        "Load with the version and configuration that the checkpoint was saved with."
    )


def expect_keys(owner: str, state: Any, keys: tuple[str, ...]) -> None:
    """Raise CheckpointError unless ``state`` is a dict with exactly these keys."""
    if not isinstance(state, dict) or set(state) != set(keys):
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise mismatch(owner, f"{found}: must have exactly the keys {sorted(keys)}")


def expect_count(owner: str, key: str, value: Any) -> int:
    """``value`` as a whole number from 0; CheckpointError when it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise mismatch(owner, f"{key}={value!r}: must be a whole number from 0")
    return value


def load_window(owner: str, window: Window, state: Any) -> None:
    """Restore a window of finite numbers; CheckpointError and no change otherwise."""
    values = state.get("values") if isinstance(state, dict) else None
    numbers = isinstance(values, list) and all(isinstance(v, float) for v in values)
    if not numbers or not all(math.isfinite(v) for v in values or ()):
        raise mismatch(owner, "window: must be a list of finite numbers")
    window.load_state_dict({"values": values})
