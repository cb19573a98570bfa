"""From a real step's numbers to what the host learns, at once or one step late.

``digest`` makes the observation; ``learn`` and ``advance`` take it in. Steps that did
not wait for their numbers are in ``run.pending`` until ``settle`` takes them in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hybridopt import correcting
from hybridopt.pending import Pending
from hybridopt.run import Run
from hybridopt.telemetry import events
from hybridopt.types import BASIS_SIZE, Extent, Mover, Observation, Verdict
from hybridopt.weights.averages import gradient_memory

__all__ = [
    "advance",
    "complete_record",
    "count_skip",
    "count_unseen_skips",
    "digest",
    "largest",
    "learn",
    "settle",
    "settle_unseen",
]


def digest(run: Run, taken: Pending) -> Observation:
    """The reading, summed over ranks: what every rank then decides by."""
    reading = taken.read()
    count = run.collective.world_size
    statistics, slopes = reading.statistics, reading.slopes
    if count > 1:
        local = torch.cat([statistics, slopes.unsqueeze(1)], 1) * run.shares
        share = [reading.loss / count, float(run.refused)]
        parts = [local.reshape(-1), torch.tensor(share, dtype=torch.float64)]
        if run.lead.unshared is not None:
            parts.append(run.lead.unshared)
        total = run.collective.sum(torch.cat(parts))
        whole, rest = total[: local.numel()].view_as(local), total[local.numel() :]
        statistics, slopes = whole[:, :-1], whole[:, -1]
        mean_loss = float(rest[0])
        refused, run.refused = bool(rest[1] > 0.0), False
        if run.lead.unshared is not None:
            run.lead.share(rest[2:])
    else:
        mean_loss, refused = reading.loss, False
    gradient_sq = statistics[:, 0]
    # What is not finite stays so in a sum.
    square = float(gradient_sq.numpy().sum())
    norm = math.sqrt(square) if math.isfinite(square) else math.nan
    finite = math.isfinite(norm) and (not taken.has_loss or math.isfinite(mean_loss))
    finite = finite and not refused
    rate = largest(taken.rates)
    # A learning rate that is no number would go into every weight.
    finite = finite and math.isfinite(rate)
    return Observation(
        step=taken.step,
        loss=mean_loss,
        gradient_norm=norm,
        finite=finite,
        gradient_sq=gradient_sq,
        dots=statistics[:, 1 : 1 + BASIS_SIZE],
        basis_sq=statistics[:, 1 + BASIS_SIZE : 1 + 2 * BASIS_SIZE],
        learning_rate=rate,
        lr_ratio=run.controller.lr_ratio(rate),
        # Behind a step that was skipped on the device, NaN gradients stand against no
        # displacement.
        slopes=slopes.nan_to_num(0.0, 0.0, 0.0),
        partial=taken.extent is not Extent.WHOLE or not taken.anchored,
        move=taken.move,
        before_turn=taken.before_turn,
        drift_measured=taken.extent is Extent.WHOLE or taken.extent.along_drift,
        drift_memory=gradient_memory(run.base) if taken.extent.along_drift else 0.0,
    )


def learn(run: Run, observation: Observation) -> None:
    """Let every learner take in an accepted observation.

    Observations without a displacement to measure along say something about the drift
    only, and only where drift windows go on without one.
    """
    correcting.learn(run, observation)
    outcome = run.controller.outcome(observation, rolled_back=False)
    if outcome is not None and observation.move is not None:
        run.controller.learn(observation.move, outcome)
        run.predictor.feedback(outcome)
    if run.controller.learns_from(observation):
        run.predictor.observe(observation)
    if math.isfinite(observation.loss):
        if math.isfinite(observation.expected_loss):
            error = abs(observation.loss - observation.expected_loss)
            run.predictor_error.add(error / max(abs(observation.loss), 1e-12))
        run.last_loss = observation.loss
    run.monitor.absorb(observation)


def advance(run: Run, observation: Observation, *, planned: bool = False) -> None:
    """Count an accepted real step wherever it counts.

    Args:
        run: Changed.
        observation: The step's.
        planned: Whether a Predict phase has begun behind the step already.
    """
    controller = run.controller
    slept = controller.sleeps_deeply
    controller.advance_real(observation.learning_rate, planned=planned)
    if slept and not controller.sleeps_deeply:
        # The window went on filling in the sleep; what it holds is no window's drift.
        run.space.restart_window()
    run.monitor.real_step()
    if controller.warm:
        run.predictor.moving = True


def settle(run: Run) -> tuple[Observation, Verdict] | None:
    """Take in the real step whose numbers were on their way; None if it was skipped,
    or if there is none.

    Called at fixed points of a run and never because numbers happen to be there, so
    that runs repeat.
    """
    taken = run.pending
    if taken is None:
        return None
    complete_record(run)
    observation, verdict = _view(run, taken)
    count_unseen_skips(run, taken.read().skips, before=taken.step)
    run.pending = None
    if not observation.finite:
        # The base left it out, so there was no displacement to move along either.
        run.controller.move = None
        run.counters.real_steps -= 1
        count_skip(run, observation, verdict)
        return None
    learn(run, observation)
    advance(run, observation, planned=run.controller.plan.horizon > 0)
    return observation, verdict


def complete_record(run: Run) -> None:
    """Put the numbers of the last real step into its record; waits for them."""
    run.last_step = run.unseen.completed(run.last_step)
    taken = run.pending
    if taken is None or taken.record is None:
        return
    observation, verdict = _view(run, taken)
    record = replace(
        taken.record,
        loss=observation.loss,
        gradient_norm=observation.gradient_norm,
        verdict=verdict.level,
        action=verdict.action,
        reason=verdict.reason,
    )
    if not observation.finite:
        record = replace(record, mover=Mover.NONE, progress=0.0)
    if run.last_step is taken.record:
        run.last_step = record
    taken.record = None
    run.sink.complete(record)


def count_skip(run: Run, observation: Observation, verdict: Verdict) -> None:
    """Count and report a step that did not happen."""
    run.counters.skipped_steps += 1
    events.step_skipped(observation.step, verdict.reason, run.counters.skipped_steps)


def count_unseen_skips(run: Run, count: int, before: int) -> None:
    """Count and report steps that did not happen, of which nobody was told."""
    if count == 0:
        return
    run.counters.real_steps -= count
    run.counters.skipped_steps += count
    reason = f"{count} of the steps before were not finite"
    events.step_skipped(before, reason, run.counters.skipped_steps)


def settle_unseen(run: Run) -> None:
    """Count the skips that no later numbers will tell of; waits for them."""
    skips = run.unseen.take_skips()
    if skips is not None:
        count_unseen_skips(run, int(skips), before=run.counters.steps)


def largest(rates: Tensor) -> float:
    """The largest of (L,) learning rates; 0 without any."""
    return float(rates.numpy().max()) if len(rates) else 0.0


def _view(run: Run, taken: Pending) -> tuple[Observation, Verdict]:
    """What the host makes of a step that it did not wait for. Pure, once all steps
    before it were taken in.
    """
    if taken.view is None:
        observation = digest(run, taken)
        verdict = run.monitor.judge(observation, can_roll_back=False)
        taken.view = observation, verdict
    return taken.view
