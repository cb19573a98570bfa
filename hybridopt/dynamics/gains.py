"""Per-tensor gains that follow the significance of their gradient alignment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.dynamics.headroom import Headroom
from hybridopt.dynamics.state import tensor_like
from hybridopt.types import BASIS_SIZE, STEP

__all__ = ["DEVIATION_FLOOR", "AlignmentGains", "Numbers"]

DEVIATION_FLOOR = 0.01
"""Added to standard errors and deviations of alignments: below a hundredth of a cosine
there is no evidence, however steady."""
DRIFT_MEMORY = 0.95
"""Decay per real step of the drift alignments, which only the features look at."""
ROLLBACK_FACTOR = 0.25
_TINY = 1e-30
Numbers = npt.NDArray[np.float64]
"""A few numbers per parameter tensor. NumPy, because at this size a torch operation
costs the host three times as long, and there are dozens per real step."""
TOGETHER = 4.0
"""Geometric means of all gains that any of them may reach."""
FADE = 0.7
"""Factor on gains per real step while the loss does not bear their promises out."""


def _row(*values: float) -> Numbers:
    return np.array(values, dtype=np.float64)


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
        self._shrink = np.sqrt(self._fresh / (1 + self._memory))
        # The drift column keeps statistics only; its gains are WindowGains'.
        self._threshold = gain.significance
        self._half_rate = _row(gain.rate / 2, 0.0)
        self._minimum = _row(gain.minimum, 0.0)
        self._maximum = _row(gain.maximum, 0.0)
        self._initial = self._bounded(_row(gain.initial, 0.0))
        self._relaxation = gain.relaxation
        self._lone_maximum = gain.lone_maximum
        self._largest = gain.maximum
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
        self._gains: Numbers = np.tile(self._initial, (self.size, 1))
        self._started = False
        self.restart()

    def restart(self) -> None:
        """Forget the alignments, keep the gains."""
        self.count = 0
        """Observations since the last restart."""
        self.headroom = Headroom()
        """Evidence of all tensors together that the rate is far too low."""
        self._remaining: Numbers = np.ones(BASIS_SIZE)
        self._mean: Numbers = np.zeros((self.size, BASIS_SIZE))
        self._square: Numbers = np.zeros((self.size, BASIS_SIZE))
        self._derive()

    # -- what is known, as tensors: not to be written ---------------------------------

    @property
    def gains(self) -> Tensor:
        """(L, J), in base steps."""
        return torch.from_numpy(self._gains)

    @gains.setter
    def gains(self, value: Tensor) -> None:
        self._gains = value.detach().numpy().copy()

    @property
    def mean(self) -> Tensor:
        """(L, J) running mean of the alignments."""
        return torch.from_numpy(self._mean)

    @property
    def deviation(self) -> Tensor:
        """(L, J) running standard deviation of one alignment."""
        return torch.from_numpy(self._deviation)

    @property
    def error(self) -> Tensor:
        """(L, J) standard error of ``mean``."""
        return torch.from_numpy(self._error)

    def significance(self) -> Tensor:
        """(L, J) t-values of the mean alignments."""
        return torch.from_numpy(self._mean / self._error)

    # -- one real step -------------------------------------------------------------

    def absorb(self, alignment: Tensor) -> None:
        """Take in one (L, J) observation; gains stay."""
        self.count += 1
        weight = self._fresh
        if self.count <= self._settled:
            self._remaining = self._remaining * self._memory
            weight = weight / (1 - self._remaining)
        seen = alignment.numpy()
        self._mean = self._mean + weight * (seen - self._mean)
        self._square = self._square + weight * (seen * seen - self._square)
        self.headroom.add(alignment[:, STEP])
        self._derive()

    def _derive(self) -> None:
        variance = self._square - self._mean * self._mean
        self._deviation: Numbers = np.sqrt(np.maximum(variance, 0.0))
        self._error: Numbers = self._deviation * self._shrink + DEVIATION_FLOOR

    def _bounded(self, gains: Numbers) -> Numbers:
        return np.minimum(np.maximum(gains, self._minimum), self._maximum)

    def grow(self, significance: Tensor) -> None:
        """Move the gains as (L, J) t-values say."""
        self.headroom.remember()
        headroom = self.headroom.value
        if not self._started:
            self._started = True
            self._gains = self._gains * self._eager**headroom
        t, limit = significance.numpy(), self._threshold
        # t minus its clamp is sign(t) max(|t| - t0, 0): the same rule in fewer passes.
        excess = t - np.minimum(np.maximum(t, -limit), limit)
        quiet = excess == 0.0
        excess = np.minimum(np.maximum(excess, -2.0), 2.0)
        if headroom > 0.0:
            excess[excess > 0.0] *= 1.0 + self._boost * headroom
        factor = np.exp(excess * self._half_rate)
        if self._relaxes and quiet.any():
            # Drift gains are zero in here: 0 / tiny, not 0 / 0.
            apart = self._minimum / np.maximum(self._gains, _TINY)
            factor = np.where(quiet, apart**self._relaxation, factor)
        self._gains = self._bounded(self._gains * factor)
        self._bound_loners()

    def _bound_loners(self) -> None:
        """Take back what a few gains have grown beyond all others.

        Where the rate is too low all tensors say so. A single one that keeps asking is
        one whose alignment is cheap to keep, and large gains on it cost the others.
        """
        steps = self._gains[:, STEP]
        if self.size == 0 or float(steps.max()) <= self._lone_maximum:
            return
        with np.errstate(divide="ignore"):
            bound = TOGETHER * float(np.exp(np.log(steps).mean()))
        bound = max(bound, self._lone_maximum)
        if bound < self._largest:
            bound *= (self._largest / bound) ** self.headroom.credit
        np.minimum(steps, bound, out=steps)

    def hold_rate(self, lr_ratio: float) -> None:
        """Keep (1 + a) lr where it was when a scheduler raises the learning rate.

        A falling rate leaves gains as they are, since schedules mean to slow down.
        """
        if 1.0 < lr_ratio < math.inf:
            gains = self._gains.copy()
            gains[:, STEP] = (1 + gains[:, STEP]) / lr_ratio - 1
            self._gains = self._bounded(gains)

    def shrink(self) -> None:
        """After a rollback: a quarter of every gain, and fresh statistics."""
        self._gains = self._bounded(self._gains * ROLLBACK_FACTOR)
        self.restart()

    def fade(self) -> None:
        """While alignments are not to be trusted: gains shrink, evidence stays."""
        self._gains = self._bounded(self._gains * FADE)

    def coefficients(self) -> Tensor:
        """(L, J) multipliers of the basis, zero for the drift: see ``WindowGains``."""
        return self.gains.clone()

    def state_dict(self) -> dict[str, Any]:
        """Gains and running alignments."""
        return {
            "count": self.count,
            "started": self._started,
            "headroom": self.headroom.state_dict(),
            "remaining": torch.from_numpy(self._remaining.copy()),
            "gains": self.gains.clone(),
            "mean": self.mean.clone(),
            "square": torch.from_numpy(self._square.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError, possibly half-way, on a mismatch."""
        count = int(state["count"])
        remaining = tensor_like(state, "remaining", torch.from_numpy(self._remaining))
        gains, mean, square = (
            tensor_like(state, key, self.gains) for key in ("gains", "mean", "square")
        )
        self.count, self._remaining = count, remaining.numpy()
        self._gains, self._mean = gains.numpy(), mean.numpy()
        self._square = square.numpy()
        self._started = bool(state["started"])
        self.headroom.load_state_dict(state["headroom"])
        self._derive()
