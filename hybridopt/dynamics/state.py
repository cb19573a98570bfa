"""Loading state dictionaries: all is checked, and a refused load undoes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import CheckpointError

__all__ = ["load_or_undo", "seeded_generator", "tensor_like"]

_UNREADABLE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_WAY_OUT = "Load with the model and configuration that the checkpoint was saved with."


def tensor_like(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    """A copy of ``state[key]``, which must have the shape and dtype of ``like``.

    Raises:
        CheckpointError: Missing, not a tensor, or of another shape or dtype.
    """
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"predictor state {key!r}={type(value).__name__}: must be a tensor. "
            f"{_WAY_OUT}"
        )
    if value.shape != like.shape or value.dtype != like.dtype:
        raise CheckpointError(
            f"predictor state {key!r} of shape {tuple(value.shape)} and {value.dtype}: "
            f"must be {tuple(like.shape)} and {like.dtype}. {_WAY_OUT}"
        )
    return value.detach().to("cpu", copy=True)


def load_or_undo(
    load: Callable[[dict[str, Any]], None],
    state: dict[str, Any],
    before: dict[str, Any],
) -> None:
    """Load ``state``; on any mismatch load ``before`` again and say what was wrong.

    Args:
        load: Restores from a state dictionary, possibly failing half-way.
        state: What to load.
        before: A state that ``load`` accepts: the one in force now.

    Raises:
        CheckpointError: The state was refused; nothing has changed.
    """
    try:
        load(state)
    except CheckpointError:
        load(before)
        raise
    except _UNREADABLE as error:
        load(before)
        raise CheckpointError(
            f"predictor state: {type(error).__name__}: {error}. {_WAY_OUT}"
        ) from error


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator of our own: the user's random streams are never touched."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(seed)
    return generator
