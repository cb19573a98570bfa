"""Whether a predicted move can have caused the trouble that came behind it."""

from __future__ import annotations

import math

from hybridopt.types import Observation

__all__ = ["is_to_blame"]

SHARE = 0.5
"""Part of the excess loss that a move's slopes have to account for."""


def is_to_blame(observation: Observation, usual_loss: float) -> bool:
    """Whether taking the last move back can mend a loss above the usual one.

    With delta the move, g the gradient at its beginning and g' at its end, a smooth
    loss changes along it by about (<g, delta> + <g', delta>) / 2, and a convex one by
    at most <g', delta>. Where both slopes are small against the excess, the batch is
    hard or the data have changed: taking the move back would throw away the gradient
    that has most to teach, and mend nothing.

    Args:
        observation: Finite, with the move that it measures.
        usual_loss: Running mean of the losses before; nan if unknown.

    Returns:
        True in doubt: no move or no gradient to look at, or nothing to compare with.
    """
    move, excess = observation.move, observation.loss - usual_loss
    if move is None or not math.isfinite(observation.gradient_norm):
        return True
    end = float((move.coefficients * observation.dots).sum())
    steepest = max(abs(end), 0.0 if math.isnan(move.slope) else abs(move.slope))
    return not steepest < SHARE * excess
