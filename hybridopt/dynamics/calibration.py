"""How far a learned model may be trusted, judged by its own past errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hybridopt.dynamics.correction import CHANNELS, Correction
from hybridopt.dynamics.state import tensor_like
from hybridopt.types import STEP

__all__ = ["Calibration"]


class Calibration:
    """Scores the forecasts of a model against what came, out of sample.

    Per channel, with y the residual that came and mu, sigma what the model had said,
    d = y^2 - (y - mu)^2 is by how much the model beat the prior (which says zero), and
    z^2 = ((y - mu) / sigma)^2 should average 1. Both are averaged over tensors, then
    over time with memory 0.95.

    ``trust`` is half the t-value of the mean of d, clipped to [0, 1]: zero until the
    model has beaten the prior, one when it did so by two standard errors. Corrections
    are multiplied by it, so a model that learns nonsense changes nothing.
    """

    MEMORY = 0.95
    MINIMUM_COUNT = 16

    def __init__(self) -> None:
        zero = torch.zeros(CHANNELS, dtype=torch.float64, device="cpu")
        self.trust = zero
        """(CHANNELS,) in [0, 1]."""
        self.trusted = False
        """Whether any channel is trusted at all."""
        self._count = zero
        self._moments = zero.repeat(3, 1)

    def add(self, targets: Tensor, said: Correction) -> None:
        """Score the forecasts of a few steps at once.

        Args:
            targets: (T, L, CHANNELS) residuals that came in T steps; nan where not
                observed.
            said: The forecasts of them, before any multiplication with trust.
        """
        gain = said.mean * (2 * targets - said.mean)
        sigma = said.log_scale.exp() + said.spread
        z_square = ((targets - said.mean) / sigma).square()
        steps = torch.stack((gain, z_square)).nanmean(2)
        known = (~steps[0].isnan()).sum(0)
        sample = torch.stack((steps[0], steps[0].square(), steps[1])).nanmean(1)
        # With no step known the weight is zero, and nothing changes.
        weight = 1 - self.MEMORY ** known.double()
        self._moments = torch.lerp(self._moments, sample.nan_to_num(0.0), weight)
        self._count = self._count + known
        self._judge()

    def _judge(self) -> None:
        rho = self.MEMORY
        gain, square, _ = self._moments / (1 - rho**self._count).clamp_min(1e-12)
        variance = (square - gain * gain).clamp_min(0.0)
        error = variance.sqrt() * math.sqrt((1 - rho) / (1 + rho)) + 1e-9
        trust = (0.5 * gain / error).clamp(0.0, 1.0)
        self.trust = trust * (self._count >= self.MINIMUM_COUNT)
        self.trusted = bool(self.trust.any())

    @property
    def overconfidence(self) -> float:
        """Root mean square of error over stated sigma of the step alignment, at least
        1; 1 before the first score.
        """
        count = float(self._count[STEP])
        if count == 0:
            return 1.0
        mean = float(self._moments[2, STEP]) / (1 - self.MEMORY**count)
        return max(1.0, math.sqrt(mean))

    def confidence(self, spread: float) -> float:
        """Factor in [0, 1] on the prior's confidence; falls with past overconfidence k
        and with the model's spread s: 1 / (k (1 + (k s)^2)), as far as it is trusted.

        Args:
            spread: Epistemic standard deviation of the step alignment's residual.
        """
        excess, trust = self.overconfidence, float(self.trust[STEP])
        sharp = 1.0 / (excess * (1.0 + (excess * spread) ** 2))
        return 1.0 - trust + trust * sharp

    def applied(self, said: Correction) -> Correction:
        """The correction that is made: what was said, as far as it is trusted."""
        return Correction(
            said.mean * self.trust,
            said.log_scale * self.trust,
            said.spread * self.trust,
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts and moments."""
        return {"count": self._count.clone(), "moments": self._moments.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; CheckpointError on a mismatch."""
        count = tensor_like(state, "count", self._count)
        moments = tensor_like(state, "moments", self._moments)
        self._count, self._moments = count, moments
        self._judge()
