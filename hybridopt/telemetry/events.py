"""Structured events of the logger ``hybridopt``: what happened that is not a step.

A library must not write on its user's console. While the user has not configured
structlog, events go to the standard library's logger ``hybridopt``, whose default
level lets only warnings and errors through (to stderr); a program that configures
``logging`` or structlog gets every event in its own format.

Events that could repeat at every step take a running ``count`` and are a warning only
when it is a power of two, so that a run with ten thousand skipped steps logs fourteen
lines. What happens in every cycle (``phase_changed``) is at level debug.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog

from hybridopt.types import Phase

__all__ = [
    "cache_discarded",
    "checkpoint_loaded",
    "kernels_fallback",
    "mover_changed",
    "phase_changed",
    "predictions_off",
    "predictions_paused",
    "predictions_resumed",
    "predictor_reset",
    "rolled_back",
    "step_skipped",
]

LOGGER_NAME = "hybridopt"


def _emit(level: int, event: str, **fields: Any) -> None:
    """Log one event; looked up anew each time, since configuration may change."""
    if structlog.is_configured():
        structlog.get_logger(LOGGER_NAME).log(level, event, **fields)
        return
    logger = logging.getLogger(LOGGER_NAME)
    # Most events of a normal run are below the default level: leave before any work.
    if logger.isEnabledFor(level):
        details = " ".join(f"{key}={value}" for key, value in fields.items())
        logger.log(level, "hybridopt: %s %s", event, details)


def _repeated(count: int) -> int:
    """Warning at counts 1, 2, 4, 8, ...; debug in between."""
    return logging.WARNING if count & (count - 1) == 0 else logging.DEBUG


def phase_changed(step: int, old: Phase, new: Phase) -> None:
    """Debug: the next step belongs to another phase."""
    _emit(
        logging.DEBUG, "phase_changed", step=step, previous=old.value, phase=new.value
    )


def mover_changed(step: int, old: str, new: str, reason: str) -> None:
    """Info: moves are proposed by another mover from here."""
    _emit(
        logging.INFO, "mover_changed", step=step, previous=old, mover=new, reason=reason
    )


def rolled_back(step: int, reason: str, count: int = 1) -> None:
    """Warning: weights are those behind the last real step again.

    Args:
        step: Index of the call to ``step``.
        reason: The worst signal in words.
        count: Rollbacks of the run so far, this one included.
    """
    _emit(_repeated(count), "rolled_back", step=step, reason=reason, count=count)


def step_skipped(step: int, reason: str, count: int = 1) -> None:
    """Warning: loss or gradient was not finite, nothing was changed by this step.

    Args:
        step: Index of the call to ``step``.
        reason: What was not finite.
        count: Skipped steps of the run so far, this one included.
    """
    _emit(_repeated(count), "step_skipped", step=step, reason=reason, count=count)


def predictions_paused(step: int, reason: str) -> None:
    """Warning: rollbacks exceeded their bound, only the base moves for a while."""
    _emit(logging.WARNING, "predictions_paused", step=step, reason=reason)


def predictions_resumed(step: int) -> None:
    """Info: the pause is over."""
    _emit(logging.INFO, "predictions_resumed", step=step)


def predictions_off(step: int, reason: str) -> None:
    """Info: no more predictions in this run (``train_off``, or they do not pay)."""
    _emit(logging.INFO, "predictions_off", step=step, reason=reason)


def predictor_reset(step: int, reason: str) -> None:
    """Warning: the predictor forgot what it had learned."""
    _emit(logging.WARNING, "predictor_reset", step=step, reason=reason)


def kernels_fallback(wanted: str, used: str, reason: str) -> None:
    """Info: ``kernels="auto"`` took another backend than the fastest one."""
    _emit(logging.INFO, "kernels_fallback", wanted=wanted, used=used, reason=reason)


def checkpoint_loaded(step: int, origin: str) -> None:
    """Info: the run continues from a checkpoint.

    Args:
        step: Calls to ``step`` that the checkpoint has seen.
        origin: The phase that it was saved in, or that it is a bare optimizer's.
    """
    _emit(logging.INFO, "checkpoint_loaded", step=step, origin=origin)


def cache_discarded(path: str, reason: str) -> None:
    """Warning: a cached file could not be used; it is made again."""
    _emit(logging.WARNING, "cache_discarded", path=path, reason=reason)
