"""Where the loss is heading, and what a move turned out to be worth: host scalars."""

from __future__ import annotations

import math
from typing import Any

from hybridopt.history import RunningMoments

__all__ = ["Efficiency", "Gate", "Honesty", "LossTrend"]


class LossTrend:
    """Exponentially weighted local linear trend of the loss, with its residual spread.

    With e = loss - (level + slope): level += slope + a e, slope += b e. ``sigma`` is
    the running root mean square of e, so a biased trend counts as an uncertain one.

    Source: Holt 1957 (reprinted 2004, Int. J. Forecasting 20(1)), in error form.
    """

    LEVEL_RATE = 0.2
    SLOPE_RATE = 0.02
    MEMORY = 0.95
    LARGEST = 1e100

    def __init__(self) -> None:
        self.count = 0
        self.level = math.nan
        self.slope = 0.0
        self.surprise = math.nan
        """The newest residual over the ``sigma`` before it; nan while unknown."""
        self._residuals = RunningMoments(self.MEMORY)

    @property
    def expected(self) -> float:
        """Loss expected at the next real step; nan before the first loss."""
        return self.level + self.slope

    @property
    def sigma(self) -> float:
        """Standard deviation of ``expected``; nan before the second residual."""
        return math.hypot(self._residuals.mean, self._residuals.std)

    def add(self, loss: float) -> None:
        """Take in one measured loss; nan, inf and overflowing ones are no evidence."""
        self.surprise = math.nan
        if not abs(loss) < self.LARGEST:
            return
        self.count += 1
        if self.count == 1:
            self.level = loss
            return
        residual, sigma = loss - self.expected, self.sigma
        if math.isfinite(sigma):
            self.surprise = residual / max(sigma, 1e-12)
        self.level += self.slope + self.LEVEL_RATE * residual
        self.slope += self.SLOPE_RATE * residual
        self._residuals.add(residual)

    def path(self, horizon: int) -> tuple[list[float], list[float]]:
        """Expected losses and standard deviations of the next ``horizon`` real steps.

        The trend continues; its uncertainty grows like that of a random walk.
        """
        steps = range(1, horizon + 1)
        return (
            [self.level + k * self.slope for k in steps],
            [self.sigma * math.sqrt(k) for k in steps],
        )

    def state_dict(self) -> dict[str, Any]:
        """Level, slope, residual moments."""
        return {
            "count": self.count,
            "level": self.level,
            "slope": self.slope,
            "surprise": self.surprise,
            "residuals": self._residuals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.count = int(state["count"])
        self.level, self.slope = float(state["level"]), float(state["slope"])
        self.surprise = float(state["surprise"])
        self._residuals.load_state_dict(state["residuals"])


class Efficiency:
    """What share of its first-order worth a move delivers, measured for free.

    A move that begins with slope s0 and ends with slope s1 along itself (both in loss
    per move, positive downhill) has lowered the loss by (s0 + s1) / 2 of the trapezoid
    rule, which is e = (1 + s1 / s0) / 2 of what its first-order worth s0 promised.
    The fresh gradient of the next real step gives s1. The ratio is clipped to [-1, 1]:
    a slope that rose is noise, and one that turned over is a full failure already.
    """

    MEMORY = 0.9
    UNKNOWN_MEAN = 0.5
    UNKNOWN_ERROR = 0.25

    def __init__(self) -> None:
        self._samples = RunningMoments(self.MEMORY)
        self.surprise = math.nan
        """The newest sample's residual in units of ``spread``; nan while unknown."""

    @property
    def mean(self) -> float:
        """Expected efficiency in [0, 1]; one half before the first sample."""
        return self._samples.mean if self._samples.count else self.UNKNOWN_MEAN

    @property
    def error(self) -> float:
        """Standard error of ``mean``; one quarter before the second sample."""
        if self._samples.count < 2:
            return self.UNKNOWN_ERROR
        return self._samples.standard_error

    @property
    def spread(self) -> float:
        """Standard deviation of one sample, with a floor of 0.05."""
        return 0.05 + (self._samples.std if self._samples.count > 1 else 0.25)

    def add(self, begin: float, end: float) -> None:
        """Judge one move by its slope at both ends; uphill beginnings are no sample."""
        self.surprise = math.nan
        if not (begin > 0.0 and math.isfinite(begin) and math.isfinite(end)):
            return
        self.add_sample(0.5 * (1.0 + min(max(end / begin, -1.0), 1.0)))

    def add_sample(self, sample: float) -> None:
        """Take in one efficiency in [0, 1]; a move that was taken back is worth 0."""
        self.surprise = (sample - self.mean) / self.spread
        self._samples.add(sample)

    def skip(self) -> None:
        """No move was made: nothing to judge."""
        self.surprise = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Moments of the samples."""
        return {"samples": self._samples.state_dict(), "surprise": self.surprise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._samples.load_state_dict(state["samples"])
        self.surprise = float(state["surprise"])


class Gate:
    """Whether whole moves still point downhill when they end, as a factor in [0, 1].

    clip(t / 2, 0, 1), t the running mean of the cosine between a move and the descent
    direction at its end, over its standard error. Near the best rate it closes: the
    moves are then right on average and worth no schedule.
    """

    MEMORY = 0.9
    FLOOR = 0.01

    def __init__(self) -> None:
        self._cosines = RunningMoments(self.MEMORY)

    @property
    def open(self) -> float:
        """The factor; 0 before the second move."""
        if self._cosines.count < 2:
            return 0.0
        error = self._cosines.standard_error + self.FLOOR
        return min(max(self._cosines.mean / error / 2.0, 0.0), 1.0)

    def add(self, slope: float, move_sq: float, gradient_sq: float) -> None:
        """Take in one move: -<g, delta> at its end, ||delta||^2, ||g||^2."""
        norm = math.sqrt(move_sq * gradient_sq)
        if norm > 0.0 and math.isfinite(slope / norm):
            self._cosines.add(slope / norm)

    def state_dict(self) -> dict[str, Any]:
        """The running moments."""
        return self._cosines.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._cosines.load_state_dict(state)


class Honesty:
    """Whether the loss falls as much as the gradients say, or they are no gradient.

    Along a move, the slope at its end is a lower bound of the average slope wherever
    the loss curves upwards, and a fresh gradient gives it without bias. So the measured
    decrease less <-g', delta> should not be negative on average. In a minimax game, or
    any field that turns, alignment promises a decrease that never comes: gains that
    followed it would spiral out.
    """

    MEMORY = 0.95
    LEAST = 10
    DOUBT = -2.5

    def __init__(self) -> None:
        self._excess = RunningMoments(self.MEMORY)
        self._loss = math.nan

    @property
    def trusted(self) -> bool:
        """False once the shortfall is significant."""
        if self._excess.count < self.LEAST:
            return True
        return self._excess.mean >= self.DOUBT * self._excess.standard_error

    def skip(self) -> None:
        """A step along which no slope was measured: the next loss starts anew."""
        self._loss = math.nan

    def add(self, loss: float, promised: float) -> None:
        """Take in a real step.

        Args:
            loss: Its loss; nan when unknown.
            promised: -<g', delta> of all that moved since the real step before.
        """
        excess = self._loss - loss - promised
        self._loss = loss
        if abs(excess) < LossTrend.LARGEST:
            self._excess.add(excess)

    def state_dict(self) -> dict[str, Any]:
        """The running moments and the last loss."""
        return {"excess": self._excess.state_dict(), "loss": self._loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._excess.load_state_dict(state["excess"])
        self._loss = float(state["loss"])
