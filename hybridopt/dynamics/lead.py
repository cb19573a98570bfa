"""How far ahead of the base's trajectory gradients should be taken, in base steps."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from hybridopt.config import LeadConfig
from hybridopt.history import RunningMoments

__all__ = ["LeadLength"]


class LeadLength:
    """The lead kappa, learned from the gradients behind the base's steps.

    With s the base's last displacement, p the one before, g the gradient behind them,

        c = -<g, s - p> / (||g|| ||s||),   r = -<g, s> / (||g|| ||s||),

    t = mean / (standard error + floor) of c (memory 0.9) and u that of r (memory 0.95),
    per measurement:

        t > 1:      kappa += eta min((t - 1) / 2, 1) clip(-u / 3, 0, 1)
        t < -1:     kappa -= eta min((-t - 1) / 2, 1)
        otherwise:  kappa -= relaxation kappa.

    c > 0 says that what the newest gradient added to the step is worth more than the
    step's memory: the lead grows until that no longer holds. u < 0 says that steps
    overshoot; where they do not, their memory is not what is wrong.

    Source: the hypergradient (Baydin et al. 2018, arXiv 1703.04782) of the weight nu =
    1 - kappa (1 - beta) / beta in quasi-hyperbolic momentum (Ma and Yarats 2019, arXiv
    1810.06801), as a test of significance.
    """

    MEMORY = 0.9
    FLOOR = 0.005
    OVERSHOOT_MEMORY = 0.95
    OVERSHOOT_FLOOR = 0.001
    OVERSHOT = 3.0
    """Standard errors of r below zero at which the lead grows at its full rate."""

    def __init__(self, config: LeadConfig) -> None:
        self.config = config
        self.value = 0.0
        """kappa, in base steps."""
        self._fresh = RunningMoments(self.MEMORY)
        self._along = RunningMoments(self.OVERSHOOT_MEMORY)

    def learn(self, statistics: Tensor) -> None:
        """Take in one measurement.

        Args:
            statistics: (n, 4), to be summed over its rows: ||g||^2, -<g, s>, -<g, p>
                and ||s||^2. What is not finite is ignored.
        """
        sums = statistics.numpy().sum(axis=0)
        square = float(sums[0] * sums[3])
        norms = math.sqrt(square) if square > 0.0 else 0.0
        if not 0.0 < norms < math.inf or not math.isfinite(sums[1] - sums[2]):
            return
        self._fresh.add(float(sums[1] - sums[2]) / norms)
        self._along.add(float(sums[1]) / norms)
        if self._fresh.count >= 2:
            self._adapt()

    def _adapt(self) -> None:
        config = self.config
        t = _significance(self._fresh, self.FLOOR)
        if t > 1.0:
            overshoot = -_significance(self._along, self.OVERSHOOT_FLOOR)
            share = min(max(overshoot / self.OVERSHOT, 0.0), 1.0)
            self.value += config.rate * min((t - 1.0) / 2.0, 1.0) * share
        elif t < -1.0:
            self.value -= config.rate * min((-t - 1.0) / 2.0, 1.0)
        else:
            self.value *= 1.0 - config.relaxation
        self.value = min(max(self.value, 0.0), config.maximum)

    def state_dict(self) -> dict[str, Any]:
        """The lead and both running moments."""
        return {
            "value": self.value,
            "fresh": self._fresh.state_dict(),
            "along": self._along.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.value = float(state["value"])
        self._fresh.load_state_dict(state["fresh"])
        self._along.load_state_dict(state["along"])


def _significance(moments: RunningMoments, floor: float) -> float:
    return moments.mean / (moments.standard_error + floor)
