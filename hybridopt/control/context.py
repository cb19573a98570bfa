"""What the bandit sees when it chooses a horizon."""

from __future__ import annotations

import math

from hybridopt.types import Forecast, Observation, step_column

__all__ = ["CONTEXT_SIZE", "context_of"]

CONTEXT_SIZE = 6


def context_of(observation: Observation, forecast: Forecast) -> list[float]:
    """Bias, confidence, log progress, log bound, log lr ratio, mean alignment.

    Returns:
        ``CONTEXT_SIZE`` finite numbers; what is not known is 0.
    """
    cosines = step_column(observation.alignment)
    values = [
        1.0,
        forecast.confidence,
        math.log1p(max(forecast.progress, 0.0)) / 4.0,
        math.log1p(max(forecast.progress_lower, 0.0)) / 4.0,
        math.log(max(observation.lr_ratio, 1e-6)),
        float(cosines.mean()) if len(cosines) else 0.0,
    ]
    return [v if math.isfinite(v) else 0.0 for v in values]
