"""The moves that a step can make, side by side.

``real_step`` serves Warmup, Full and the gradient form of Correct; ``predicted_step``
is Predict; ``validated_step`` is the forward-only form of Correct; ``roll_back``
undoes. Each leaves the plan for the next step. A step that may take something back is
judged before any weight moves; where the base skips bad steps on the device and nothing
can be taken back, a real step is judged one step late and waits for nothing.
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
from hybridopt.glancing import Glance, glance, look_on_device, pass_by
from hybridopt.measuring import advance, count_skip, digest, largest, learn, settle
from hybridopt.moving import (
    Planned,
    begin_move,
    move_weights,
    plan_move,
    take_base_step,
)
from hybridopt.pending import Pending
from hybridopt.run import Run
from hybridopt.skipping import skips_on_device
from hybridopt.telemetry import events
from hybridopt.types import (
    BASIS_SIZE,
    STEP,
    Extent,
    Level,
    Mover,
    Observation,
    Verdict,
    step_column,
)
from hybridopt.unseen import Look
from hybridopt.weights.averages import gradient_memory
from hybridopt.weights.reading import PendingReading

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
    complete: bool = True
    """False where loss, gradient norm and verdict are still on their way."""
    look: Look | None = None
    """Where they stay on the device unless somebody asks."""


def real_step(
    run: Run, loss: Tensor | float | None, step_base: Callable[[], Any]
) -> Done:
    """Judge the gradient, step the base, then plan and start the move behind it.

    Gradients are in ``p.grad``. Anything not finite skips the step or takes the last
    move back; the base never sees it, or skips it on the device.
    """
    run.space.refresh()
    run.settle()
    extent = _extent(run)
    if extent is Extent.GLANCE:
        late = run.device.type in run.skips_on
        seen = look_on_device(run, loss) if late else glance(run, loss)
        if isinstance(seen, Look):
            return _unseen_step(run, seen, step_base)
        if seen is not None:
            return _glanced_step(run, seen, step_base)
        extent = run.controller.extent_without_glances
    taken = Pending(
        step=run.counters.steps,
        reading=run.space.observe(loss, extent),
        has_loss=loss is not None,
        rates=run.rates(),
        anchored=run.space.anchored and run.space.stepped,
        extent=extent,
    )
    # Steps that a Predict phase consumed can be taken back here, if the host judges
    # before the base steps. A rate that is no number is kept from the base likewise.
    consumed = run.controller.plan.horizon > 0
    if not consumed and skips_on_device(run) and math.isfinite(run.top_rate()):
        return _unjudged_step(run, taken, step_base)
    settle(run)
    taken.move = run.controller.move
    return _judged_step(run, taken, step_base)


def _extent(run: Run) -> Extent:
    """How much of a real step to measure."""
    if run.space.held:
        coasting = run.controller.sleep_steps > 0 and run.controller.coasting
        return Extent.DRIFT if coasting else Extent.NORM
    if not run.space.can_doze:
        return Extent.WHOLE
    if run.controller.coasting:
        run.controller.averaged = gradient_memory(run.base) > 0.0
        run.controller.late = run.device.type in run.skips_on
    return run.controller.extent


def _judged_step(run: Run, taken: Pending, step_base: Callable[[], Any]) -> Done:
    """The host waits for the numbers and judges before the base steps."""
    observation = digest(run, taken)
    verdict = run.monitor.judge(observation, can_roll_back=run.space.moved)
    # Behind a secant move little was measured, because nobody needed more, not even now
    # that the moves may have come to an end: then a whole step comes first.
    held = run.space.held
    extent = Extent.WHOLE if held else taken.extent
    newton = quasi_newton.before_base(run, observation, extent)
    if newton.rejected:
        return _newton_retry(run, observation, verdict)
    if verdict.action is RecoveryAction.ROLL_BACK and not newton.judged:
        return roll_back(run, observation, verdict)
    if not observation.finite:
        run.mark_consumed()
        return _skip(run, observation, verdict)
    expected = correcting.expected_displacement(run, taken.move)
    learn(run, observation)
    run.controller.move = None
    if newton.engaged:
        extent = Extent.WHOLE
    take_base_step(run, step_base, extent=extent, held=newton.engaged)
    correcting.learn_weights(run, expected)
    run.counters.real_steps += 1
    advance(run, observation)
    planned, mover = Planned(), Mover.NONE
    if newton.engaged:
        if quasi_newton.after_base(run, observation):
            mover = Mover.SECANT
            run.counters.secant_moves += 1
    elif newton.quiet and not held:
        planned = plan_move(run, observation, verdict, taken.rates, extent)
        mover = begin_move(run, planned)
    if not run.controller.plan.runs_backward:
        # Only a predicted step has to tell these gradients from fresh ones.
        run.mark_consumed()
    return _done(
        planned,
        mover,
        taken,
        loss=observation.loss,
        verdict=verdict,
        gradient_norm=observation.gradient_norm,
        action=verdict.action,
    )


def _unjudged_step(run: Run, taken: Pending, step_base: Callable[[], Any]) -> Done:
    """The base steps while the numbers travel, and skips on the device what is not
    finite; the host takes in the real step before, whose numbers are there by now.

    The move behind this step is planned from that one, before the base steps, so that
    it can be made in the pass that takes the base's step in. Behind a step that the
    base skipped it moves nothing: there is no displacement to go along.
    """
    assert isinstance(taken.reading, PendingReading)
    flag = taken.reading.non_finite(run.device)
    taken.reading.send(run.unseen.take_skips())
    run.unseen.known = [p for p in run.space.parameters() if p.grad is not None]
    before = settle(run)
    taken.move, run.controller.move = run.controller.move, None
    planned = Planned()
    if before is not None:
        planned = plan_move(run, *before, taken.rates, taken.extent)
    # Only what a Predict phase moves can be taken back behind a step judged late.
    final = planned.move is None or planned.move.horizon == 0
    made = take_base_step(
        run, step_base, flag, planned.gains, extent=taken.extent, final=final
    )
    run.pending = taken
    run.counters.real_steps += 1
    mover = begin_move(run, planned, made=made)
    if not run.controller.plan.runs_backward:
        run.mark_consumed()
    return _done(planned, mover, taken, complete=False)


def _glanced_step(run: Run, seen: Glance, step_base: Callable[[], Any]) -> Done:
    """The base's own step and no more, with finite numbers and no move to judge."""
    take_base_step(run, step_base, extent=Extent.GLANCE)
    pass_by(run, seen)
    return Done(
        Mover.NONE,
        seen.loss,
        gradient_norm=seen.gradient_norm,
        learning_rate=seen.rate,
    )


def _unseen_step(run: Run, look: Look, step_base: Callable[[], Any]) -> Done:
    """The same on a GPU, unseen; the real step before may still be on its way."""
    before = settle(run)
    planned = Planned()
    if before is not None:
        planned = plan_move(run, *before, run.rates(), Extent.GLANCE)
    turns = planned.forecast is not None
    extent = Extent.TURN if turns else Extent.GLANCE
    take_base_step(run, step_base, look.flag, extent=extent, final=True)
    run.unseen.note(look)
    pass_by(run, Glance(math.nan, math.nan, look.rate), before_turn=turns)
    mover = begin_move(run, planned)
    if not run.controller.plan.runs_backward:
        run.mark_consumed()
    return Done(mover, math.nan, learning_rate=look.rate, look=look)


def predicted_step(run: Run) -> Done:
    """Make one share of the planned move; no backward, no forward, no batch."""
    controller = run.controller
    plan, move = controller.plan, controller.move
    assert move is not None
    run.space.refresh()
    rates = run.rates()
    release_unsharded(run.model)
    # First, so that nobody looks gradients up that mean nothing here.
    run.clear_gradients()
    finite = move_weights(run, controller.scaled(rates), 1.0 / plan.horizon)
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
    assert run.model is not None
    run.space.refresh()
    settle(run)
    controller, move = run.controller, run.controller.move
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
        move=move,
    )
    verdict = run.monitor.judge(observation, can_roll_back=run.space.moved)
    if verdict.action is RecoveryAction.ROLL_BACK:
        return roll_back(run, observation, verdict)
    run.clear_gradients()
    controller.advance_validated()
    run.last_loss = loss
    progress = 0.0 if move is None else move.progress
    horizon = controller.plan.horizon
    return Done(Mover.NONE, loss, verdict, horizon=horizon, progress=progress)


def roll_back(run: Run, observation: Observation, verdict: Verdict) -> Done:
    """Weights, buffers and plan as they were behind the last real step, bit for bit.

    The base's state needs no copy: the base has not stepped since, because the monitor
    judges before it does.
    """
    outcome = run.controller.outcome(observation, rolled_back=True)
    run.space.roll_back()
    run.restore_buffers()
    if outcome is not None and observation.move is not None:
        run.controller.learn(observation.move, outcome)
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
    events.rolled_back(run.counters.steps, reason, run.counters.rolled_back_steps)


def _skip(run: Run, observation: Observation, verdict: Verdict) -> Done:
    """Not finite and nothing to take back: the step does not happen."""
    count_skip(run, observation, verdict)
    return Done(
        Mover.NONE,
        observation.loss,
        verdict,
        gradient_norm=observation.gradient_norm,
        learning_rate=observation.learning_rate,
        action=RecoveryAction.SKIP_STEP,
    )


def _done(
    planned: Planned,
    mover: Mover,
    taken: Pending,
    loss: float = math.nan,
    **known: Any,
) -> Done:
    """What is known of a real step, its numbers being ``known`` or not."""
    forecast, move = planned.forecast, planned.move
    rate = largest(taken.rates)
    if forecast is None:
        return Done(mover, loss, learning_rate=rate, **known)
    return Done(
        mover,
        loss,
        horizon=0 if move is None else move.horizon,
        confidence=forecast.confidence,
        progress=forecast.progress,
        gain=float(step_column(forecast.coefficients).mean()),
        learning_rate=rate,
        **known,
    )
