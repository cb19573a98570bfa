"""What moves weights in a real or predicted step: the base, and the planned move."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hybridopt import correcting
from hybridopt.hooks import without_global_hooks
from hybridopt.run import Run
from hybridopt.types import Forecast, Mover, Observation, Verdict

__all__ = ["move_weights", "plan_move", "take_base_step"]


def take_base_step(
    run: Run, step_base: Callable[[], Any], skip: Tensor | None = None
) -> None:
    """The base's own step, with displacement and drift taken in around it.

    Args:
        skip: 0-dim, 1.0 when the base must leave everything as it is; for fused bases,
            which read it on the device under the name that GradScaler uses.
    """
    ready = run.space.ready
    if ready:
        run.space.before_base()
    started = time.perf_counter()
    if skip is not None:
        run.base.found_inf = skip  # type: ignore[attr-defined]
    try:
        with without_global_hooks():
            step_base()
    finally:
        if skip is not None:
            del run.base.found_inf  # type: ignore[attr-defined]
    run.counters.base_s += time.perf_counter() - started
    if ready:
        run.space.after_base()
    if not run.space.complete():
        run.space.allocate()
    run.keep_buffers()


def plan_move(
    run: Run, observation: Observation, verdict: Verdict, rates: Tensor
) -> tuple[Forecast | None, int, Mover]:
    """Choose the move; fold it into this step when it consumes none.

    Args:
        run: Its predictor has taken in ``observation``.
        observation: The newest one that was taken in.
        verdict: On that one.
        rates: (L,) learning rates of the step just made, whose displacement moves.
    """
    if not run.controller.warm or run.controller.asleep or not run.space.anchored:
        return None, 0, Mover.NONE
    assert observation.slopes is not None
    forecast = run.predictor.forecast(observation.slopes)
    if forecast.turns_window:
        run.space.turn_window()
        if run.pending is not None:
            run.pending.before_turn = True
    plain = forecast
    forecast = correcting.correct(run, forecast)
    allowed = run.monitor.may_predict(run.counters.steps)
    move = run.controller.schedule(
        observation, verdict, forecast, rates, observation.slopes, allowed
    )
    if move is None:
        return forecast, 0, Mover.NONE
    if run.config.residual.enabled:
        move.predicted, move.latent = plain.coefficients, plain.latent
        move.slopes = observation.slopes
    if move.horizon == 0:
        if not move_weights(run, move.coefficients, 1.0):
            run.space.roll_back()
            run.controller.move = None
            return forecast, 0, Mover.NONE
        run.counters.folded_moves += 1
    return forecast, move.horizon, Mover.GAIN


def move_weights(run: Run, coefficients: Tensor, scale: float) -> bool:
    """Make a share of a move; False when it was refused as not finite.

    Every rank answers alike, without communication: coefficients are the same
    everywhere, and a shard that alone refuses says so in the next observation, which
    then takes the whole move back on every rank.
    """
    if not bool(coefficients.isfinite().all()):
        return False
    written = run.space.move(coefficients, scale)
    if run.collective.world_size == 1:
        return written
    run.refused = run.refused or not written
    return True
