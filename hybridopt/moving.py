"""What moves weights in a real or predicted step: the base, and the planned move."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from hybridopt import correcting
from hybridopt.hooks import without_global_hooks
from hybridopt.run import Run
from hybridopt.types import (
    DRIFT,
    STEP,
    Extent,
    Forecast,
    Move,
    Mover,
    Observation,
    Verdict,
)

__all__ = ["Planned", "begin_move", "move_weights", "plan_move", "take_base_step"]


@dataclass(frozen=True, slots=True)
class Planned:
    """What was chosen to do behind a real step."""

    forecast: Forecast | None = None
    """What the predictor said; None where it was not asked."""
    move: Move | None = None
    """The move to make; None for none."""

    @property
    def gains(self) -> Tensor | None:
        """(L,) of a move that is folded into the step and goes along s alone."""
        move = self.move
        if move is None or move.horizon or bool(move.coefficients[:, DRIFT].any()):
            return None
        gains = move.coefficients[:, STEP]
        return gains if bool(gains.isfinite().all()) else None


def take_base_step(
    run: Run,
    step_base: Callable[[], Any],
    skip: Tensor | None = None,
    gains: Tensor | None = None,
    *,
    extent: Extent = Extent.WHOLE,
    held: bool = False,
    final: bool = False,
) -> bool:
    """The base's own step, with displacement and drift taken in around it.

    Args:
        run: Its weights, its base's state and its directions change.
        step_base: Steps the base.
        skip: 0-dim, 1.0 when the base must leave everything as it is; for fused bases,
            which read it on the device under the name that GradScaler uses.
        gains: (L,) of a move along s to make in the same pass, if that can be done.
        extent: If not whole, nobody needs the displacement; and with no move to take
            back behind it, no buffers either.
        held: Whether a secant move is to undo the step's displacement, which then
            nobody needs either.
        final: Whether nothing behind this step will be taken back: no buffers either.

    Returns:
        Whether that move was made.
    """
    made = False
    dozes, turning = extent is not Extent.WHOLE, extent is Extent.TURN
    ready = not dozes and run.space.ready
    if ready and not held:
        run.space.before_base()
    leading = _may_lead(run, held) and run.lead.begin(
        run.space.ops,
        run.space.tracked_buckets,
        asleep=run.controller.sleeps_deeply,
        on_host=run.device.type == "cpu",
        shares=run.shares if run.collective.world_size > 1 else None,
    )
    started = time.perf_counter()
    if skip is not None:
        run.base.found_inf = skip  # type: ignore[attr-defined]
    try:
        # A secant move undoes the step: nothing of it is held.
        exponent = 0.0 if held else run.controller.hold
        with without_global_hooks(), run.hold.held(run.base.param_groups, exponent):
            step_base()
    finally:
        if skip is not None:
            del run.base.found_inf  # type: ignore[attr-defined]
    run.counters.base_s += time.perf_counter() - started
    if leading:
        run.lead.end(run.space.ops, skip)
    if dozes:
        run.space.doze(windows=run.controller.coasting, due=turning)
    elif ready and held:
        run.space.hold()
    elif ready:
        made = run.space.after_base(gains)
    # A parameter that is new waits until something is measured.
    if extent is not Extent.GLANCE and not run.space.complete():
        run.space.allocate()
    if final:
        run.buffers = []
    elif not dozes or turning:
        run.keep_buffers()
    return made


def _may_lead(run: Run, held: bool) -> bool:
    """Whether weights may be put ahead behind this base step: not behind secant moves,
    which leave the base's trajectory.
    """
    if held:
        run.lead.drop()
    return not held and run.controller.warm


def plan_move(
    run: Run,
    observation: Observation,
    verdict: Verdict,
    rates: Tensor,
    extent: Extent,
) -> Planned:
    """Choose the move behind a real step; moves nothing.

    Where the step's displacement is not taken in there is nothing to move along but the
    drift, and that only as its window turns.

    Args:
        run: Its predictor has taken in ``observation``.
        observation: The newest one that was taken in.
        verdict: On that one.
        rates: (L,) learning rates of the step whose displacement is to move.
        extent: Of that step.
    """
    if not run.controller.warm or run.controller.asleep or not run.space.anchored:
        return Planned()
    assert observation.slopes is not None
    forecast = run.predictor.forecast(observation.slopes)
    plain = forecast
    whole = extent is Extent.WHOLE
    if whole:
        forecast = correcting.correct(run, forecast)
    else:
        if not forecast.turns_window:
            run.controller.expect_turn(forecast)
            return Planned()
        along_drift = forecast.coefficients.clone()
        along_drift[:, STEP] = 0.0
        forecast = replace(forecast, coefficients=along_drift)
    allowed = run.monitor.may_predict(run.counters.steps)
    move = run.controller.schedule(
        observation, verdict, forecast, rates, observation.slopes, allowed
    )
    if move is not None and whole and run.config.residual.enabled:
        move.predicted, move.latent = plain.coefficients, plain.latent
        move.slopes = observation.slopes
    return Planned(forecast, move)


def begin_move(run: Run, planned: Planned, *, made: bool = False) -> Mover:
    """Turn the drift window if one ends, and make a move that consumes no steps.

    Args:
        run: The base has stepped.
        planned: What to do.
        made: Whether the move itself was made in the base step's own pass.

    Returns:
        What moves behind the step.
    """
    if planned.forecast is not None and planned.forecast.turns_window:
        run.space.turn_window()
        if run.pending is not None:
            run.pending.before_turn = True
    move = planned.move
    if move is None:
        return Mover.NONE
    if move.horizon == 0:
        # What is judged late cannot be taken back.
        revocable = run.pending is None
        if not (made or move_weights(run, move.coefficients, 1.0, revocable)):
            run.space.roll_back()
            run.controller.move = None
            return Mover.NONE
        run.counters.folded_moves += 1
    return Mover.GAIN


def move_weights(
    run: Run, coefficients: Tensor, scale: float, revocable: bool = True
) -> bool:
    """Make a share of a move; False when it was refused as not finite.

    Every rank answers alike, without communication: coefficients are the same
    everywhere, and a shard that alone refuses says so in the next observation, which
    then takes the whole move back on every rank.
    """
    if not np.isfinite(coefficients.numpy()).all():
        return False
    written = run.space.move(coefficients, scale, revocable=revocable)
    if run.collective.world_size == 1:
        return written
    run.refused = run.refused or not written
    return True
