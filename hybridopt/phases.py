"""The moves that a step can make, side by side.

``real_step`` serves Warmup, Full and the gradient form of Correct; ``predicted_step``
is Predict; ``validated_step`` is the forward-only form of Correct; ``roll_back``
undoes. Each judges before any weight moves, and leaves the plan for the next step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridopt import correcting, quasi_newton
from hybridopt.closure import forward_only
from hybridopt.distributed import release_unsharded
from hybridopt.errors import RecoveryAction
from hybridopt.hooks import without_global_hooks
from hybridopt.run import Run
from hybridopt.telemetry import events
from hybridopt.types import (
    BASIS_SIZE,
    STEP,
    Forecast,
    Level,
    Mover,
    Observation,
    Phase,
    Verdict,
)
from hybridopt.weights.reading import Reading

__all__ = ["Done", "predicted_step", "real_step", "validated_step"]

_QUIET = Verdict(Level.OK, RecoveryAction.CONTINUE)


@dataclass(frozen=True, slots=True)
class Done:
    """What a phase did, for the step record."""

    mover: Mover
    loss: float
    verdict: Verdict = _QUIET
    loss_predicted: bool = False
    horizon: int = 0
    confidence: float = 0.0
    progress: float = 0.0
    gain: float = 0.0
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    action: RecoveryAction = RecoveryAction.CONTINUE


def real_step(
    run: Run, loss: Tensor | float | None, step_base: Callable[[], Any]
) -> Done:
    """Judge the gradient, step the base, then plan and start the move behind it.

    Gradients are in ``p.grad``. Anything not finite skips the step or takes the last
    move back; the base never sees it.
    """
    run.space.refresh()
    run.settle()
    dozes = run.controller.dozes and run.space.can_doze
    pending = run.space.observe(loss, dozes)
    must_wait = run.controller.plan.phase is Phase.CORRECT
    guarded = (
        run.skips_on_device and not must_wait and bool(run.rates().isfinite().all())
    )
    if guarded:
        # Nothing that consumed steps can be taken back here, so the base may step
        # while the numbers travel; it skips what is not finite on the device.
        flag = pending.non_finite(run.device)
        pending.send()
        _take_base_step(run, step_base, flag, dozes=dozes)
    observation = _digest(run, pending.wait(), loss is not None)
    verdict = run.monitor.judge(
        observation, can_roll_back=run.space.moved and not guarded
    )
    newton = quasi_newton.before_base(run, observation, dozes)
    if newton.rejected:
        return _newton_retry(run, observation, verdict)
    if verdict.action is RecoveryAction.ROLL_BACK and not newton.judged:
        return roll_back(run, observation, verdict)
    if not observation.finite:
        return _skip(run, observation, verdict)
    expected = None if guarded else correcting.expected_displacement(run)
    _learn(run, observation)
    if not guarded:
        _take_base_step(run, step_base, dozes=dozes and not newton.engaged)
        correcting.learn_weights(run, expected)
    run.counters.real_steps += 1
    slept = run.controller.asleep
    run.controller.advance_real(observation)
    if slept and not run.controller.asleep:
        # The window went on filling in the sleep; what it holds is no window's drift.
        run.space.restart_window()
    run.monitor.real_step()
    if run.controller.warm:
        run.predictor.moving = True
    forecast, horizon, mover = None, 0, Mover.NONE
    if newton.engaged:
        if quasi_newton.after_base(run, observation):
            mover = Mover.SECANT
            run.counters.secant_moves += 1
    elif newton.quiet:
        forecast, horizon, mover = _plan_move(run, observation, verdict)
    if not run.controller.plan.runs_backward:
        # Only a predicted step has to tell these gradients from fresh ones.
        run.mark_consumed()
    return _done(run, observation, verdict, forecast, horizon, mover)


def predicted_step(run: Run) -> Done:
    """Make one share of the planned move; no backward, no forward, no batch."""
    controller = run.controller
    plan, move = controller.plan, controller.move
    assert move is not None
    run.space.refresh()
    rates = run.rates()
    release_unsharded(run.model)
    finite = _move(run, controller.scaled(rates), 1.0 / plan.horizon)
    run.clear_gradients()
    run.counters.predicted_steps += 1
    if not finite:
        run.space.roll_back()
        run.restore_buffers()
        run.counters.rolled_back_steps += 1
        controller.after_rollback()
        _report_rollback(run, "predicted move is not finite")
        verdict = Verdict(Level.CRITICAL, RecoveryAction.ROLL_BACK)
        return Done(plan.mover, run.last_loss, verdict, action=verdict.action)
    correcting.correct_weights(run)
    expected = move.loss
    if math.isfinite(expected) and math.isfinite(run.last_loss):
        share = (plan.position + 1) / plan.horizon
        expected = run.last_loss + share * (expected - run.last_loss)
    else:
        expected = run.last_loss
    controller.advance_predicted(run.forward_form and run.model is not None)
    return Done(
        plan.mover,
        expected,
        loss_predicted=True,
        horizon=plan.horizon,
        progress=move.progress,
        gain=float(move.coefficients[:, STEP].mean()),
        learning_rate=run.top_rate(),
    )


def validated_step(run: Run, closure: Callable[[], Any]) -> Done:
    """Check the move by a forward pass alone, then correct it or take it back.

    Costs one forward. The user's random streams and BatchNorm statistics are untouched.
    """
    controller, move = run.controller, run.controller.move
    assert run.model is not None
    assert move is not None
    run.space.refresh()
    started = time.perf_counter()
    loss = forward_only(closure, run.model)
    release_unsharded(run.model)
    run.counters.closure_s += time.perf_counter() - started
    run.counters.closure_calls += 1
    run.counters.validated_steps += 1
    total = torch.tensor([loss, 1.0], dtype=torch.float64)
    loss = float(run.collective.sum(total)[0]) / run.collective.world_size
    size = len(run.space.parameters())
    empty = torch.zeros(size, BASIS_SIZE, dtype=torch.float64)
    observation = Observation(
        step=run.counters.steps,
        loss=loss,
        gradient_norm=math.nan,
        finite=math.isfinite(loss),
        gradient_sq=torch.zeros(size, dtype=torch.float64),
        dots=empty,
        basis_sq=empty,
        learning_rate=run.top_rate(),
        lr_ratio=1.0,
        moved_steps=move.horizon,
        moved_progress=move.progress,
        expected_loss=move.loss,
        expected_loss_sigma=move.loss_sigma,
    )
    verdict = run.monitor.judge(observation, can_roll_back=run.space.moved)
    if verdict.action is RecoveryAction.ROLL_BACK:
        return roll_back(run, observation, verdict)
    run.clear_gradients()
    controller.advance_validated()
    run.last_loss = loss
    return Done(Mover.NONE, loss, verdict, horizon=move.horizon, progress=move.progress)


def roll_back(run: Run, observation: Observation, verdict: Verdict) -> Done:
    """Weights, buffers and plan as they were behind the last real step, bit for bit.

    The base's state needs no copy: the base has not stepped since, because the monitor
    judges before it does.
    """
    outcome = run.controller.outcome(observation, rolled_back=True)
    run.space.roll_back()
    run.restore_buffers()
    if outcome is not None:
        run.controller.learn(outcome)
        run.predictor.feedback(outcome)
    run.controller.after_rollback()
    if run.secant is not None:
        run.secant.abandon()
    run.counters.rolled_back_steps += 1
    run.clear_gradients()
    _report_rollback(run, verdict.reason)
    if run.monitor.rolled_back(run.counters.steps):
        events.predictions_paused(run.counters.steps, verdict.reason)
    return Done(
        Mover.NONE,
        observation.loss,
        verdict,
        gradient_norm=observation.gradient_norm,
        learning_rate=observation.learning_rate,
        action=RecoveryAction.ROLL_BACK,
    )


# -- parts of a real step --------------------------------------------------------


def _digest(run: Run, reading: Reading, has_loss: bool) -> Observation:
    """The reading, summed over ranks: what every rank then decides by."""
    count = run.collective.world_size
    statistics, slopes = reading.statistics, reading.slopes
    if count > 1:
        local = torch.cat([statistics, slopes.unsqueeze(1)], 1) * run.shares
        share = [reading.loss / count, float(run.refused)]
        rest = torch.tensor(share, dtype=torch.float64)
        total = run.collective.sum(torch.cat([local.reshape(-1), rest]))
        local, mean_loss = total[:-2].view_as(local), float(total[-2])
        statistics, slopes = local[:, :-1], local[:, -1]
        refused, run.refused = bool(total[-1] > 0.0), False
    else:
        mean_loss, refused = reading.loss, False
    gradient_sq = statistics[:, 0]
    # What is not finite stays so in a sum.
    square = float(gradient_sq.sum())
    norm = math.sqrt(square) if math.isfinite(square) else math.nan
    finite = math.isfinite(norm) and (not has_loss or math.isfinite(mean_loss))
    finite = finite and not refused
    rate = run.top_rate()
    # A learning rate that is no number would go into every weight.
    finite = finite and math.isfinite(rate)
    run.slopes = slopes
    move = run.controller.move
    return Observation(
        step=run.counters.steps,
        loss=mean_loss,
        gradient_norm=norm,
        finite=finite,
        gradient_sq=gradient_sq,
        dots=statistics[:, 1 : 1 + BASIS_SIZE],
        basis_sq=statistics[:, 1 + BASIS_SIZE : 1 + 2 * BASIS_SIZE],
        learning_rate=rate,
        lr_ratio=run.controller.lr_ratio(rate),
        moved_steps=0 if move is None else move.horizon,
        moved_progress=0.0 if move is None else move.progress,
        expected_loss=math.nan if move is None else move.loss,
        expected_loss_sigma=math.nan if move is None else move.loss_sigma,
    )


def _learn(run: Run, observation: Observation) -> None:
    """Let every learner take in an accepted observation."""
    correcting.learn(run, observation)
    outcome = run.controller.outcome(observation, rolled_back=False)
    if outcome is not None:
        run.controller.learn(outcome)
        run.predictor.feedback(outcome)
    if not run.controller.asleep and run.space.anchored:
        run.predictor.observe(observation)
    if math.isfinite(observation.loss):
        if math.isfinite(observation.expected_loss):
            error = abs(observation.loss - observation.expected_loss)
            run.predictor_error.add(error / max(abs(observation.loss), 1e-12))
        run.last_loss = observation.loss
    run.monitor.absorb(observation)


def _take_base_step(
    run: Run,
    step_base: Callable[[], Any],
    skip: Tensor | None = None,
    dozes: bool = False,
) -> None:
    """The base's own step, with displacement and drift taken in around it.

    Args:
        dozes: Nobody needs them; and with no move to come, no buffers either.
        skip: 0-dim, 1.0 when the base must leave everything as it is; for fused bases,
            which read it on the device under the name that GradScaler uses.
    """
    ready = run.space.ready
    if ready and not dozes:
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
    if dozes:
        run.space.doze()
    elif ready:
        run.space.after_base()
    if not run.space.complete():
        run.space.allocate()
    if not dozes:
        run.keep_buffers()


def _plan_move(
    run: Run, observation: Observation, verdict: Verdict
) -> tuple[Forecast | None, int, Mover]:
    """Choose the move; fold it into this step when it consumes none."""
    if not run.controller.warm or run.controller.asleep or not run.space.anchored:
        return None, 0, Mover.NONE
    forecast = run.predictor.forecast(run.slopes)
    if forecast.turns_window:
        run.space.turn_window()
    plain = forecast
    forecast = correcting.correct(run, forecast)
    allowed = run.monitor.may_predict(run.counters.steps)
    move = run.controller.schedule(
        observation, verdict, forecast, run.rates(), run.slopes, allowed
    )
    if move is None:
        return forecast, 0, Mover.NONE
    if run.config.residual.enabled:
        move.predicted, move.latent = plain.coefficients, plain.latent
        move.slopes = run.slopes
    if move.horizon == 0:
        if not _move(run, move.coefficients, 1.0):
            run.space.roll_back()
            run.controller.move = None
            return forecast, 0, Mover.NONE
        run.counters.folded_moves += 1
    return forecast, move.horizon, Mover.GAIN


def _move(run: Run, coefficients: Tensor, scale: float) -> bool:
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


def _newton_retry(run: Run, observation: Observation, verdict: Verdict) -> Done:
    """A secant move made the loss worse: back to the anchor, then a shorter move."""
    run.space.roll_back()
    run.restore_buffers()
    quasi_newton.retry(run)
    run.counters.rolled_back_steps += 1
    run.mark_consumed()
    return Done(
        Mover.SECANT,
        observation.loss,
        verdict,
        gradient_norm=observation.gradient_norm,
        learning_rate=observation.learning_rate,
        action=RecoveryAction.ROLL_BACK,
    )


def _report_rollback(run: Run, reason: str) -> None:
    counters = run.counters
    events.rolled_back(counters.steps, reason, counters.rolled_back_steps)


def _skip(run: Run, observation: Observation, verdict: Verdict) -> Done:
    """Not finite and nothing to take back: the step does not happen."""
    run.counters.skipped_steps += 1
    run.mark_consumed()
    counters = run.counters
    events.step_skipped(counters.steps, verdict.reason, counters.skipped_steps)
    return Done(
        Mover.NONE,
        observation.loss,
        verdict,
        gradient_norm=observation.gradient_norm,
        learning_rate=observation.learning_rate,
        action=RecoveryAction.SKIP_STEP,
    )


def _done(
    run: Run,
    observation: Observation,
    verdict: Verdict,
    forecast: Forecast | None,
    horizon: int,
    mover: Mover,
) -> Done:
    return Done(
        mover,
        observation.loss,
        verdict,
        horizon=horizon,
        confidence=0.0 if forecast is None else forecast.confidence,
        progress=0.0 if forecast is None else forecast.progress,
        gain=0.0 if forecast is None else float(forecast.coefficients[:, STEP].mean()),
        gradient_norm=observation.gradient_norm,
        learning_rate=observation.learning_rate,
        action=verdict.action,
    )
