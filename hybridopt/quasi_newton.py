"""The secant mover inside a real step: when it engages, judges and moves.

On low-noise problems the pending move is judged by the next real step's own loss, so it
costs no extra forward; worse means back to the anchor and a shorter try.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridopt.run import Run
from hybridopt.types import Extent, Observation
from hybridopt.weights.flat import (
    flatten,
    flatten_gradients,
    preconditioner,
    set_flat_,
)

__all__ = ["Newton", "after_base", "before_base", "retry"]


@dataclass(frozen=True, slots=True)
class Newton:
    """Where the secant mover stands at this real step."""

    quiet: bool
    """It leaves the field to the gain moves."""
    engaged: bool = False
    """It will move behind this base step."""
    judged: bool = False
    """It has just judged its own pending move, so the monitor need not."""
    rejected: bool = False
    """Its pending move made the loss worse or not finite."""


def before_base(
    run: Run, observation: Observation, extent: Extent = Extent.WHOLE
) -> Newton:
    """Judge the pending move and record position and gradient; writes no weight.

    Args:
        extent: Less than whole in a sleep, which a loss that is not smooth does not
            change.
    """
    mover = run.secant
    if mover is None or run.secant_off:
        return Newton(quiet=True)
    if run.decays:
        # A secant move goes where the loss alone is lowest, and would take back the
        # decay that the user asked for.
        mover.abandon()
        return Newton(quiet=True)
    if extent is not Extent.WHOLE and not run.noise.is_low:
        mover.abandon()
        return Newton(quiet=True)
    judged = mover.pending
    accepted = mover.judge(observation.loss if observation.finite else float("nan"))
    if observation.finite:
        parameters = run.space.parameters()
        position, gradient = flatten(parameters), flatten_gradients(parameters)
        slopes = mover.record(position, gradient)
        if slopes is not None and accepted:
            run.noise.add(run.secant_loss, observation.loss, *slopes)
    if not accepted:
        return Newton(quiet=False, judged=judged, rejected=True)
    if not observation.finite:
        return Newton(quiet=False, judged=judged)
    run.secant_loss = observation.loss
    if run.noise.is_high:
        # The loss is noisy: secant pairs would measure the draw of the batch.
        mover.release()
        run.secant_off = True
        return Newton(quiet=True)
    warm = run.controller.warm and (
        run.controller.real_steps + 1 >= run.config.secant.warmup_steps
    )
    allowed = run.monitor.may_predict(run.counters.steps)
    engaged = warm and allowed and run.noise.stays_low(run.space.held)
    return Newton(quiet=False, engaged=engaged, judged=judged)


def after_base(run: Run, observation: Observation) -> bool:
    """Move on to x + J, x being where the gradient was taken; False for no move."""
    mover = run.secant
    assert mover is not None
    parameters = run.space.parameters()
    direction = mover.direction(preconditioner(run.base, parameters))
    if direction is None:
        return False
    run.space.keep_anchor()
    set_flat_(parameters, mover.propose(direction, observation.loss))
    run.space.moved = True
    return True


def retry(run: Run) -> None:
    """From the anchor, make the shortened move; or stay there after too many tries."""
    assert run.secant is not None
    shorter = run.secant.retry()
    if shorter is not None:
        set_flat_(run.space.parameters(), shorter)
        run.space.moved = True
