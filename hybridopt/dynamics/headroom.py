"""How much further than the base steps there is to go, read from all tensors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from hybridopt.history import RunningMoments
from hybridopt.types import STEP, Observation

__all__ = ["Headroom", "Room"]


class Headroom:
    """Whether the learning rate is far below what the landscape allows, in [0, 1].

    With c the mean over tensors of the alignment of one real step, m its running mean
    and t = m / (standard error + 0.005):

        h = clip((t - 6) / 6, 0, 1) * clip((m - 0.2) / 0.2, 0, 1).

    Averaging over tensors takes most of the noise out, so it is plain within ten steps:
    fine-tuning at a conservative rate shows m near 0.5 and t above 15; at a tuned rate,
    with tiny batches or with noisy labels |m| stays below 0.15 and |t| below 4. During
    the fall from a learning-rate warm-up m is high but t is not, because m is moving.
    """

    MEMORY = 0.8
    FLOOR = 0.005
    SIGNIFICANCE = (6.0, 12.0)
    """t between which h rises from 0 to 1."""
    ALIGNMENT = (0.2, 0.4)
    """m between which h rises from 0 to 1."""

    CREDIT_MEMORY = 0.99

    def __init__(self) -> None:
        self._pooled = RunningMoments(self.MEMORY)
        self.credit = 0.0
        """Largest h while gains grew, less one per cent per real step since."""

    def add(self, alignment: Tensor) -> None:
        """Take in one real step's (L,) alignments with the step direction."""
        values = alignment.tolist()
        if values:
            self._pooled.add(sum(values) / len(values))

    def remember(self) -> None:
        """Count h towards the credit; once per real step on which gains grow.

        Not before: while a learning-rate warm-up raises a tiny rate h is high.
        """
        self.credit = max(self.value, self.CREDIT_MEMORY * self.credit)

    @property
    def value(self) -> float:
        """h; 0 before the second observation."""
        if self._pooled.count < 2:
            return 0.0
        mean = self._pooled.mean
        t = mean / (self._pooled.standard_error + self.FLOOR)
        return _ramp(t, *self.SIGNIFICANCE) * _ramp(mean, *self.ALIGNMENT)

    def state_dict(self) -> dict[str, Any]:
        """The running moments, and the credit."""
        return {"pooled": self._pooled.state_dict(), "credit": self.credit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._pooled.load_state_dict(state["pooled"])
        self.credit = float(state["credit"])


class Room:
    """Whether the base's steps stop short of overshooting, in [0, 1].

    With c = -<g, s> / (||g|| ||s||) over all weights together, g the gradient behind a
    base step s, m its running mean over real steps that were measured whole, and
    t = m / (standard error + 0.001):

        room = clip(1 + t / 3, 0, 1).

    At a tuned rate each step overshoots along its own noise, and c is small but
    reliably negative: t of -3 to -10 over a fifth of a run of the text models, the
    convnet and the diamonds. At a rate that is too low it is not (research notes, "Room
    to grow").

    Source: the hypergradient of the learning rate (Baydin et al. 2018, arXiv
    1703.04782), as a test and not as a step.
    """

    MEMORY = 0.95
    FLOOR = 0.001
    OVERSHOT = 3.0
    """Standard errors below zero at which there is no room."""

    def __init__(self) -> None:
        self._cosine = RunningMoments(self.MEMORY)

    def add(self, observation: Observation) -> None:
        """Take in one real step whose displacement was measured."""
        squares = observation.basis_sq.numpy()[:, STEP].sum()
        norms = math.sqrt(float(observation.gradient_sq.numpy().sum() * squares))
        if norms > 0.0:
            self._cosine.add(-float(observation.dots.numpy()[:, STEP].sum()) / norms)

    @property
    def value(self) -> float:
        """The room; 0 before the second observation."""
        if self._cosine.count < 2:
            return 0.0
        t = self._cosine.mean / (self._cosine.standard_error + self.FLOOR)
        return _ramp(t, -self.OVERSHOT, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The running moments."""
        return self._cosine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._cosine.load_state_dict(state)


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)
