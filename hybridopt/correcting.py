"""Residual corrections inside a step: learn from the last move, correct the next one.

Off by default (``residual.enabled``). In coefficient space always; in weight space, as
low-rank factors, when ``residual.rank`` is positive and they fit into memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hybridopt.run import Run
from hybridopt.types import STEP, Forecast, Move, Observation

__all__ = [
    "correct",
    "correct_weights",
    "expected_displacement",
    "ideal",
    "learn",
    "learn_weights",
]

LONGEST_REACH = 2.0
"""The ideal is at most this many times the move: beyond it the parabola is a guess."""


def ideal(move: Move, observation: Observation) -> Tensor:
    """(L, J) coefficients at which the loss along each tensor's move would be lowest.

    By the parabola through the slopes at both ends of the move: sigma at its beginning
    and sigma' at its end vanish at c sigma / (sigma - sigma'). Uphill beginnings and
    slopes that did not fall reach to ``LONGEST_REACH``.
    """
    made = move.coefficients.clone()
    if move.slopes is None:
        return made
    begin = move.slopes
    fall = begin + observation.dots[:, STEP]  # sigma - sigma', with sigma' = -<g', s>
    reach = torch.where(fall > 0, begin / fall, torch.full_like(fall, LONGEST_REACH))
    reach = reach.nan_to_num(1.0).clamp(0.0, LONGEST_REACH)
    made[:, STEP] = made[:, STEP] * torch.where(
        begin > 0, reach, torch.ones_like(reach)
    )
    return made


def learn(run: Run, observation: Observation) -> None:
    """Hand the residual of the observed move to the corrector."""
    move = observation.move
    if move is None or move.predicted is None or move.latent is None:
        return
    run.corrector.update(move.latent, move.predicted, ideal(move, observation))


def correct(run: Run, forecast: Forecast) -> Forecast:
    """The forecast with the corrector's coefficients added; never below zero."""
    if not run.config.residual.enabled or forecast.latent is None:
        return forecast
    made = forecast.coefficients
    addition = run.corrector.correction(forecast.latent, (made.shape[0], made.shape[1]))
    return replace(forecast, coefficients=(made + addition).clamp_min(0.0))


def expected_displacement(run: Run, move: Move | None) -> list[Tensor] | None:
    """One predicted step's displacement per tensor, before the base overwrites s.

    None unless weight-space residuals are kept and a Predict phase has just ended.
    """
    if not _keeps_factors(run) or move is None or move.horizon == 0:
        return None
    return run.space.combine(move.coefficients / move.horizon)


def learn_weights(run: Run, expected: list[Tensor] | None) -> None:
    """What the base's own displacement was, less what a predicted step assumed."""
    if expected is None:
        return
    measured = run.space.displacements()
    run.corrector.update_weights(  # type: ignore[attr-defined]
        [m.float() - e.float() for m, e in zip(measured, expected, strict=True)]
    )


def correct_weights(run: Run) -> None:
    """Add the low-rank correction of one predicted step to the weights."""
    if not _keeps_factors(run):
        return
    like = run.space.displacements()
    correction = run.corrector.weight_correction(like)  # type: ignore[attr-defined]
    if correction is not None:
        run.space.add(correction)


def _keeps_factors(run: Run) -> bool:
    config = run.config.residual
    return config.enabled and config.rank > 0 and hasattr(run.corrector, "factors")
