"""What is normal: robust level and noise of a series, and how often it turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import ne

__all__ = ["MIN_OBSERVATIONS", "measure_rise", "turning_share"]

MIN_OBSERVATIONS = 8
"""Accepted observations before a signal that rests on statistics may speak."""
RELATIVE_FLOOR = 0.01
"""Smallest sigma, relative to the series: full-batch losses have hardly any noise, and
without a floor a rise in the tenth digit would be many sigma."""
PEAK_SIGMA = 3.0
"""Deviation in sigma that the largest recent value has at most: what was accepted
lately is no spike when it comes back."""
NOTABLE_SIGMA = 2.0
"""Linear rise below which the logarithmic reading is not worth its time."""


def measure_rise(
    value: float, values: Sequence[float], floor: float
) -> tuple[float, float]:
    """How far a value lies above the recent level of a series that may have a trend.

    Level and sigma are taken within blocks (``_level_and_sigma``), so a falling series
    neither raises an alarm nor hides one. Noise that multiplies a positive series has
    a long upper tail that a linear reading takes for spikes: where the linear reading
    is large, the same is done with logarithms and the milder reading counts.

    Args:
        value: The new value, not yet in ``values``; finite.
        values: At least ``MIN_OBSERVATIONS``, finite, oldest first.
        floor: Smallest sigma in the unit of the values.

    Returns:
        The level, in the unit of the values, and the rise above it in sigma.
    """
    size = max(MIN_OBSERVATIONS, len(values) // 4)
    level, sigma = _level_and_sigma(values, size)
    scale = sum(map(abs, values[-size:])) / size
    sigma = max(sigma, RELATIVE_FLOOR * scale, floor)
    rise = (value - level) / sigma if sigma > 0 else 0.0
    if rise < NOTABLE_SIGMA or min(values) <= 0:
        return level, rise
    log_level, log_sigma = _level_and_sigma([math.log(v) for v in values], size)
    log_rise = (math.log(value) - log_level) / max(log_sigma, RELATIVE_FLOOR)
    return level, min(rise, log_rise)


def _level_and_sigma(values: Sequence[float], size: int) -> tuple[float, float]:
    """Mean of the newest block of ``size`` and pooled deviation within blocks.

    Deviations from each block's own mean leave the trend out, so a falling series
    keeps a level close to its end and a sigma that is noise. Sigma covers the noise of
    a new value and that of the level.
    """
    square, peak, count, end = 0.0, 0.0, 0, len(values)
    newest = math.nan
    while end >= size:
        block = values[end - size : end]
        mean = sum(block) / size
        if end == len(values):
            newest = mean
        square += sum([(v - mean) * (v - mean) for v in block])
        peak = max(peak, max(block) - mean)
        count += size - 1
        end -= size
    sigma = math.sqrt(square / count * (1.0 + 1.0 / size))
    return newest, max(sigma, peak / PEAK_SIGMA)


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
    rising = [difference > 0 for difference in differences]
    turns = sum(map(ne, rising, rising[1:]))
    n = places + 2
    bound = 2 * places / 3 + 3.1 * math.sqrt((16 * n - 29) / 90)
    return turns / places, bound / places
