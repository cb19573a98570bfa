"""Does the predictor know what it knows? Forecasts against what came, in bins.

Watches one hybrid run from outside. Three questions: how often the loss of the next
real step lies within the interval that was forecast; whether moves make the progress
that was expected of them; and whether higher confidence means more of it delivered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

__all__ = [
    "CONFIDENCES",
    "LEVELS",
    "PREDICTORS",
    "PROGRESS_EDGES",
    "Watch",
    "merged",
]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Nominal coverage of the central intervals that are counted."""
_QUANTILES = tuple(NormalDist().inv_cdf(0.5 + level / 2) for level in LEVELS)
PROGRESS_EDGES = tuple(2.0**k for k in range(-5, 5))
"""Ends of the bins of expected progress, in base steps; two more lie outside."""
CONFIDENCES = 5
"""Bins of equal width of the confidence in [0, 1]."""


PREDICTORS = ("hybrid", "hybrid:prior", "hybrid:linear", "hybrid:mlp", "hybrid:rssm")
"""Arms whose forecasts are kept and tabled."""


class Watch:
    """An optimizer that steps as the hybrid does and takes notes of its forecasts.

    Reads attributes only; what the hybrid does is unchanged.
    """

    def __init__(self, hybrid: Any) -> None:
        self.hybrid = hybrid
        self._confidence = math.nan
        self._move: Any = None
        self._squares = 0.0
        self._loss = [0] * (1 + len(LEVELS))
        self._progress = [[0, 0.0, 0.0] for _ in range(len(PROGRESS_EDGES) + 1)]
        self._sure = [[0, 0.0, 0, 0.0, 0.0] for _ in range(CONFIDENCES)]
        predictor = hybrid.run.predictor
        self._feedback = predictor.feedback
        predictor.feedback = self._hear

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hybrid, name)

    def step(self, closure: Any) -> Any:
        """One step of the hybrid."""
        self._move = move = self.hybrid.run.controller.move
        result = self.hybrid.step(closure)
        record = self.hybrid.last_step
        # A finite gradient norm marks a real step: its loss is a measurement.
        if record is not None and math.isfinite(record.gradient_norm):
            if move is not None:
                self._score(record.loss, move.loss, move.loss_sigma)
            self._confidence = record.confidence
        return result

    def _score(self, loss: float, expected: float, sigma: float) -> None:
        if not (math.isfinite(loss + expected + sigma) and sigma > 0.0):
            return
        z = abs(loss - expected) / sigma
        self._loss[0] += 1
        # A single absurd error must not be all that the mean square shows.
        self._squares += min(z, 100.0) ** 2
        for i, quantile in enumerate(_QUANTILES):
            self._loss[1 + i] += z <= quantile

    def _hear(self, outcome: Any) -> Any:
        move = self._move
        if move is not None and math.isfinite(move.progress + outcome.progress):
            expected, measured = move.progress, outcome.progress
            row = self._progress[sum(expected >= edge for edge in PROGRESS_EDGES)]
            row[0], row[1], row[2] = row[0] + 1, row[1] + expected, row[2] + measured
            if math.isfinite(self._confidence):
                last = CONFIDENCES - 1
                sure = self._sure[min(last, int(self._confidence * CONFIDENCES))]
                sure[0] += 1
                sure[1] += self._confidence
                sure[2] += measured >= 0.5 * expected
                sure[3] += expected
                sure[4] += measured
        return self._feedback(outcome)

    def calibration(self) -> dict[str, Any]:
        """Counts and sums; several runs' are added up by ``merged``.

        Returns:
            ``loss``: number of forecasts, then how many came within each of ``LEVELS``;
            ``loss_squares``: sum of squared errors in forecast deviations;
            ``progress``: per bin, number, sum expected, sum measured;
            ``confidence``: per bin, number, sum of confidence, number that delivered at
            least half of what was expected, sum expected, sum measured.
        """
        return {
            "loss": list(self._loss),
            "loss_squares": self._squares,
            "progress": [list(row) for row in self._progress],
            "confidence": [list(row) for row in self._sure],
        }


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The sum of several runs' notes; None without any."""
    total: dict[str, Any] | None = None
    for part in parts:
        if part:
            total = (
                part if total is None else {k: _sum(total[k], part[k]) for k in part}
            )
    return total


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [_sum(x, y) for x, y in zip(a, b, strict=True)]
    return a + b
