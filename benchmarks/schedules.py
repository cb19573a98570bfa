"""Learning-rate schedules as factors of the step, so that any length can be run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ["Schedule", "factor", "warmup"]

Schedule = Literal["constant", "linear", "cosine", "wsd"]


def factor(schedule: Schedule, total_steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate at a step from 0.

    constant: 1. linear: (N - t) / N, as fine-tuning uses it. cosine and wsd start with
    a warm-up over N/20 steps (at least one); wsd stays at 1 and falls linearly over
    the last quarter. The last step's factor is positive: no step is wasted. Beyond N
    the factor of the last step holds.
    """
    n = max(1, total_steps)
    rising = max(1, n // 20)
    decay = max(1, n // 4)

    def value(step: int) -> float:
        t = min(step, n - 1)
        if schedule == "constant":
            return 1.0
        if schedule == "linear":
            return (n - t) / n
        rise = min(1.0, (t + 1) / rising)
        if schedule == "wsd":
            return min(rise, (n - t) / decay)
        progress = max(0, t - rising + 1) / max(1, n - rising + 1)
        return rise * 0.5 * (1.0 + math.cos(math.pi * progress))

    return value


def warmup(schedule: Schedule, total_steps: int) -> int:
    """Steps of the schedule's warm-up; 0 where it has none."""
    return max(1, total_steps // 20) if schedule in ("cosine", "wsd") else 0
