"""The record that every step leaves."""

from __future__ import annotations

import time

from hybridopt.phases import Done
from hybridopt.run import Run
from hybridopt.telemetry import events
from hybridopt.types import Phase, StepRecord

__all__ = ["record_step"]


def record_step(run: Run, phase: Phase, arm: int, done: Done, busy_s: float) -> None:
    """Count the step and leave its record.

    Args:
        run: Changed.
        phase: The step's own; the plan is the next step's by now.
        arm: The bandit's, in whose plan the step was.
        done: What the phase did.
        busy_s: Seconds in closure and base before this step, all steps together.
    """
    counters = run.counters
    outside = counters.closure_s + counters.base_s - busy_s
    bookkeeping = max(time.perf_counter() - run.started_s - outside, 0.0)
    counters.bookkeeping_s += bookkeeping
    record = StepRecord(
        step=counters.steps,
        phase=phase,
        mover=done.mover,
        loss=done.loss,
        loss_predicted=done.loss_predicted,
        horizon=done.horizon,
        arm=arm,
        confidence=done.confidence,
        progress=done.progress,
        verdict=done.verdict.level,
        action=done.action,
        gradient_norm=done.gradient_norm,
        gain=done.gain,
        learning_rate=done.learning_rate,
        bookkeeping_s=bookkeeping,
        reason=done.verdict.reason,
    )
    counters.steps += 1
    run.last_step = record
    run.unseen.remember(record, done.look)
    if not done.complete:
        assert run.pending is not None
        run.pending.record = record
    # Lists of gradients must not outlive the step: they would keep memory alive.
    run.space.refresh()
    (run.sink.write if done.complete else run.sink.hold)(record)
    if run.controller.plan.phase is not phase:
        events.phase_changed(record.step, phase, run.controller.plan.phase)
