"""What is normal: robust level and noise of a series, and how often it turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MIN_OBSERVATIONS", "Normal", "measure_normal", "turning_share"]

MIN_OBSERVATIONS = 8
"""Accepted observations before a signal that rests on statistics may speak."""
RELATIVE_FLOOR = 0.01
"""Smallest sigma, relative to the series: full-batch losses have hardly any noise, and
without a floor a rise in the tenth digit would be many sigma."""
PEAK_SIGMA = 3.0
"""Deviation in sigma that the largest recent value has at most: what was accepted
lately is no spike when it comes back."""


@dataclass(frozen=True, slots=True)
class Normal:
    """Where a series has been lately and how much it scatters, in its own unit."""

    level: float
    sigma: float
    log_level: float
    """Level of the logarithm; nan unless all values are positive."""
    log_sigma: float
    """Sigma of the logarithm, no unit; nan unless all values are positive."""

    def deviation(self, value: float) -> float:
        """How many sigma ``value`` lies above the level; 0 when nothing is known.

        The milder of the linear and the logarithmic reading: noise that multiplies a
        positive loss has a long upper tail that the linear reading takes for a spike.
        """
        if not self.sigma > 0:
            return 0.0
        linear = (value - self.level) / self.sigma
        if linear <= 0 or not self.log_sigma > 0:
            return linear
        return min(linear, (math.log(value) - self.log_level) / self.log_sigma)


def measure_normal(values: Sequence[float], floor: float) -> Normal:
    """Level and noise of the newest values of a series that may have a trend.

    Args:
        values: At least ``MIN_OBSERVATIONS``, finite, oldest first.
        floor: Smallest sigma in the unit of the values.
    """
    size = max(MIN_OBSERVATIONS, len(values) // 4)
    level, sigma = _level_and_sigma(values, size)
    scale = sum(abs(v) for v in values[-size:]) / size
    sigma = max(sigma, RELATIVE_FLOOR * scale, floor)
    if min(values) <= 0:
        return Normal(level, sigma, math.nan, math.nan)
    log_level, log_sigma = _level_and_sigma([math.log(v) for v in values], size)
    return Normal(level, sigma, log_level, max(log_sigma, RELATIVE_FLOOR))


def _level_and_sigma(values: Sequence[float], size: int) -> tuple[float, float]:
    """Mean of the newest block of ``size`` and pooled deviation within blocks.

    Deviations from each block's own mean leave the trend out, so a falling series
    keeps a level close to its end and a sigma that is noise. Sigma covers the noise of
    a new value and that of the level.
    """
    square, count, end = 0.0, 0, len(values)
    level = math.nan
    while end >= size:
        block = values[end - size : end]
        mean = sum(block) / size
        square += sum((v - mean) * (v - mean) for v in block)
        count += size - 1
        if end == len(values):
            level = mean
        end -= size
    sigma = math.sqrt(square / count * (1.0 + 1.0 / size))
    peak = max(values[-2 * size :]) - level
    return level, max(sigma, peak / PEAK_SIGMA)


def turning_share(values: Sequence[float]) -> tuple[float, float]:
    """Share of sign changes between successive differences, and its chance bound.

    The bound is what independent noise exceeds about once in a thousand windows: of n
    values 2 (n - 2) / 3 are turning points on average, with variance (16 n - 29) / 90.
    Differences of exactly zero are left out: a converged loss does not oscillate.

    Source: turning point test, Bienayme 1874; Kendall and Stuart 1976, vol. 3.
    """
    differences = [b - a for a, b in itertools.pairwise(values) if b != a]
    places = len(differences) - 1
    if places < 1:
        return 0.0, 1.0
    turns = sum((a > 0) != (b > 0) for a, b in itertools.pairwise(differences))
    n = places + 2
    bound = 2 * places / 3 + 3.1 * math.sqrt((16 * n - 29) / 90)
    return turns / places, bound / places
