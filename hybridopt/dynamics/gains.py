"""Per-tensor gains that follow the significance of their gradient alignment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.dynamics.headroom import Headroom
from hybridopt.dynamics.state import tensor_like
from hybridopt.types import BASIS_SIZE, STEP, Observation

__all__ = ["DEVIATION_FLOOR", "AlignmentGains", "alignments"]

DEVIATION_FLOOR = 0.01
"""Added to standard errors and deviations of alignments: below a hundredth of a cosine
there is no evidence, however steady."""
DRIFT_MEMORY = 0.95
"""Decay per real step of the drift alignments, which only the features look at."""
ROLLBACK_FACTOR = 0.25
_TINY = 1e-30
TOGETHER = 4.0
"""Geometric means of all gains that any of them may reach."""
FADE = 0.7
"""Factor on gains per real step while the loss does not bear their promises out."""


def _row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def alignments(observation: Observation) -> Tensor:
    """``Observation.alignment``, (L, J), in half the passes: it is asked for at every
    real step, and every pass over a few numbers costs microseconds.
    """
    squares = observation.gradient_sq.unsqueeze(1) * observation.basis_sq
    cosines = squares.rsqrt_().mul_(observation.dots).neg_()
    return cosines.nan_to_num_(0.0, 0.0, 0.0)


class AlignmentGains:
    """The rule that learns nothing but gains: L tensors by J directions.

    With c the (L, J) alignments of one real step, per direction with memory rho, rate
    eta and significance t0:

        m <- rho m + (1 - rho) c,  q <- rho q + (1 - rho) c^2   (bias-corrected)
        se = sqrt(max(q - m^2, 0)) sqrt((1 - rho) / (1 + rho)) + 0.01,  t = m / se
        log a += eta sign(t) clip((|t| - t0) / 2, 0, 1),  a clipped to its range.

    m and q are kept bias-corrected: m += w (c - m) with w = (1 - rho) / (1 - rho^n).

    Three amendments by measurement (docs/research-notes.md, "Gains that rest"):

    * Where |t| < t0 a gain relaxes: log a -= r log(a / a_min). Noise passes t0 about as
      often upwards as downwards, so without it gains wander over their whole range.
    * With headroom h (``Headroom``) growth is (1 + boost h) times as fast, and the
      first gains are a_0 (eager / a_0)^h instead of a_0.
    * A gain that grows alone is bounded: at most b (a_max / b)^H, H the credit of
      headroom seen lately and b the larger of ``lone_maximum`` and 4 geometric means.

    Source: with memory 0 and no significance this is hypergradient adaptation of a
    per-tensor rate (Baydin et al. 2018, arXiv 1703.04782) in the form of a move.
    Differs: growth is bounded per step and needs significance.
    """

    def __init__(self, config: HybridConfig, size: int) -> None:
        gain = config.gain
        self._memory = _row(gain.memory, DRIFT_MEMORY)
        self._fresh = 1 - self._memory
        self._shrink = (self._fresh / (1 + self._memory)).sqrt()
        # The drift column keeps statistics only; its gains are WindowGains'.
        self._threshold = _row(gain.significance, gain.significance)
        self._negative = -self._threshold
        self._half_rate = _row(gain.rate / 2, 0.0)
        self._minimum = _row(gain.minimum, 0.0)
        self._maximum = _row(gain.maximum, 0.0)
        initial = _row(gain.initial, 0.0)
        self._initial = initial.clamp(self._minimum, self._maximum)
        self._relaxation = gain.relaxation
        self._lone_maximum = gain.lone_maximum
        self._largest = gain.maximum
        self._rest = _row(gain.minimum, 0.0)
        self._relaxes = gain.relaxation > 0.0 and gain.minimum > 0.0
        self._boost = gain.boost
        self._eager = max(gain.eager / gain.initial, 1.0) if gain.initial else 1.0
        # From here on the bias correction is 1 to the last bit.
        slowest = max(gain.memory, DRIFT_MEMORY)
        self._settled = math.ceil(math.log(1e-17) / math.log(slowest))
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Initial gains, no statistics."""
        self.gains = self._initial.repeat(self.size, 1)
        """(L, J), in base steps."""
        self._started = False
        self.restart()

    def restart(self) -> None:
        """Forget the alignments, keep the gains."""
        self.count = 0
        """Observations since the last restart."""
        self.headroom = Headroom()
        """Evidence of all tensors together that the rate is far too low."""
        empty = torch.zeros(self.size, BASIS_SIZE, dtype=torch.float64, device="cpu")
        self._remaining = torch.ones(BASIS_SIZE, dtype=torch.float64, device="cpu")
        self.mean = empty
        """(L, J) running mean of the alignments."""
        self._square = empty
        self.deviation = empty
        """(L, J) running standard deviation of one alignment."""
        self.error = empty + DEVIATION_FLOOR
        """(L, J) standard error of ``mean``."""

    def absorb(self, alignment: Tensor) -> None:
        """Take in one (L, J) observation; gains stay."""
        self.count += 1
        weight = self._fresh
        if self.count <= self._settled:
            self._remaining = self._remaining * self._memory
            weight = weight / (1 - self._remaining)
        self.mean = torch.lerp(self.mean, alignment, weight)
        self._square = torch.lerp(self._square, alignment * alignment, weight)
        self.headroom.add(alignment[:, STEP])
        self._derive()

    def _derive(self) -> None:
        variance = torch.addcmul(self._square, self.mean, self.mean, value=-1)
        self.deviation = variance.clamp_min_(0.0).sqrt_()
        self.error = (self.deviation * self._shrink).add_(DEVIATION_FLOOR)

    def significance(self) -> Tensor:
        """(L, J) t-values of the mean alignments."""
        return self.mean / self.error

    def grow(self, significance: Tensor) -> None:
        """Move the gains as (L, J) t-values say."""
        self.headroom.remember()
        headroom = self.headroom.value
        if not self._started:
            self._started = True
            self.gains = self.gains * self._eager**headroom
        # t minus its clamp is sign(t) max(|t| - t0, 0): the same rule in fewer passes.
        excess = significance - significance.clamp(self._negative, self._threshold)
        quiet = excess == 0.0
        excess.clamp_(-2.0, 2.0)
        if headroom > 0.0:
            fast = excess * (1.0 + self._boost * headroom)
            excess = torch.where(excess > 0.0, fast, excess)
        factor = excess.mul_(self._half_rate).exp_()
        if self._relaxes:
            # Drift gains are zero in here: 0 / tiny, not 0 / 0.
            relaxed = (self._rest / self.gains.clamp_min(_TINY)).pow_(self._relaxation)
            factor = torch.where(quiet, relaxed, factor)
        self.gains = factor.mul_(self.gains).clamp_(self._minimum, self._maximum)
        self._bound_loners()

    def _bound_loners(self) -> None:
        """Take back what a few gains have grown beyond all others.

        Where the rate is too low all tensors say so. A single one that keeps asking is
        one whose alignment is cheap to keep, and large gains on it cost the others.
        """
        steps = self.gains[:, STEP]
        if self.size == 0 or float(steps.max()) <= self._lone_maximum:
            return
        bound = TOGETHER * float(steps.log().mean().exp())
        bound = max(bound, self._lone_maximum)
        if bound < self._largest:
            bound *= (self._largest / bound) ** self.headroom.credit
        steps.clamp_max_(bound)

    def hold_rate(self, lr_ratio: float) -> None:
        """Keep (1 + a) lr where it was when a scheduler raises the learning rate.

        A falling rate leaves gains as they are, since schedules mean to slow down.
        """
        if 1.0 < lr_ratio < math.inf:
            held = (1 + self.gains[:, STEP]) / lr_ratio - 1
            gains = self.gains.clone()
            gains[:, STEP] = held
            self.gains = gains.clamp_(self._minimum, self._maximum)

    def shrink(self) -> None:
        """After a rollback: a quarter of every gain, and fresh statistics."""
        self.gains = (self.gains * ROLLBACK_FACTOR).clamp_(self._minimum, self._maximum)
        self.restart()

    def fade(self) -> None:
        """While alignments are not to be trusted: gains shrink, evidence stays."""
        self.gains = (self.gains * FADE).clamp_(self._minimum, self._maximum)

    def coefficients(self) -> Tensor:
        """(L, J) multipliers of the basis, zero for the drift: see ``WindowGains``."""
        return self.gains.clone()

    def state_dict(self) -> dict[str, Any]:
        """Gains and running alignments."""
        return {
            "count": self.count,
            "started": self._started,
            "headroom": self.headroom.state_dict(),
            "remaining": self._remaining.clone(),
            "gains": self.gains.clone(),
            "mean": self.mean.clone(),
            "square": self._square.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError, possibly half-way, on a mismatch."""
        count = int(state["count"])
        remaining = tensor_like(state, "remaining", self._remaining)
        gains = tensor_like(state, "gains", self.gains)
        mean = tensor_like(state, "mean", self.mean)
        square = tensor_like(state, "square", self._square)
        self.count, self._remaining, self.gains = count, remaining, gains
        self.mean, self._square = mean, square
        self._started = bool(state["started"])
        self.headroom.load_state_dict(state["headroom"])
        self._derive()
