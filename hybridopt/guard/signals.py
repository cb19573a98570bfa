"""Six ways of noticing that training goes wrong, each a ``Signal``.

A signal compares one observation with what was accepted before. Statistics cover a
window of real steps, so that they follow a loss that falls by orders of magnitude, and
say nothing before they have seen enough. Only NaN and inf need no statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hybridopt.config import DivergenceConfig, HybridConfig
from hybridopt.errors import CheckpointError
from hybridopt.history import Window
from hybridopt.protocols import Signal
from hybridopt.types import Level, Observation, SignalReading

__all__ = [
    "MIN_OBSERVATIONS",
    "GradientExplosion",
    "LossDeviation",
    "NonFinite",
    "Oscillation",
    "PredictionError",
    "VanishingGradient",
    "default_signals",
    "is_finite",
]

MIN_OBSERVATIONS = 8
"""Accepted observations before a signal that rests on statistics may speak."""
NOISE_FLOOR = 0.01
"""Smallest standard deviation, relative to the loss: full-batch losses have hardly any
noise, and without a floor a rise in the tenth digit would be many sigma."""
ROUNDING_FLOOR = 1e-10
"""Smallest standard deviation, relative to the largest loss seen: what is left of a
perfectly fitted loss is rounding."""
SPIKE_SIGMA = 3.0
"""Least deviation at which ``divergence_threshold`` counts."""
EXPLOSION_FACTOR = 3.0
"""Multiple of the explosion threshold that is critical."""


def is_finite(observation: Observation) -> bool:
    """Whether loss and gradient are usable; a nan loss alone means 'not known'."""
    return (
        observation.finite
        and math.isfinite(observation.gradient_norm)
        and not math.isinf(observation.loss)
    )


def default_signals(config: HybridConfig) -> tuple[Signal, ...]:
    """All six signals with the thresholds of ``config``."""
    divergence = config.divergence
    return (
        NonFinite(),
        LossDeviation(divergence, config.divergence_threshold),
        GradientExplosion(divergence),
        VanishingGradient(divergence),
        PredictionError(divergence),
        Oscillation(divergence),
    )


class NonFinite:
    """NaN or inf in the loss or the gradient: critical, from the first step on."""

    name = "non_finite"
    every_step = True

    def read(self, observation: Observation) -> SignalReading:
        """Value 1 when something is not finite, else 0."""
        bad = not is_finite(observation)
        level = Level.CRITICAL if bad else Level.OK
        return SignalReading(self.name, level, float(bad), 1.0)

    def absorb(self, observation: Observation) -> None:
        """Nothing to learn: what is not finite is never normal."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the judgement needs no history."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts the empty state and nothing else."""
        _expect_keys(self.name, state, ())


class LossDeviation:
    """How many standard deviations the loss lies above its recent level.

    The level is the mean of the newest quarter of the window and sigma the pooled
    deviation within quarters, so that a falling loss neither shifts the level far nor
    inflates sigma. Both are taken on the loss and, while it is positive, on its
    logarithm; the milder of the two counts, since noise that multiplies the loss has
    a long upper tail. Sigma is at least a third of the largest deviation in the
    newest quarter: what has just been accepted once is no spike.
    """

    name = "loss_deviation"

    def __init__(self, config: DivergenceConfig, divergence_threshold: float) -> None:
        self.threshold = config.loss_sigma_threshold
        self.divergence_threshold = divergence_threshold
        self._window = _window(config)
        self._largest = 0.0

    def read(self, observation: Observation) -> SignalReading:
        """Caution at the threshold, warning at 1.5 times, critical at twice.

        Also critical when a positive level is exceeded by more than
        ``divergence_threshold`` (relative) and by more than three sigma.
        """
        values, loss = self._window.values, observation.loss
        if len(values) < MIN_OBSERVATIONS or not math.isfinite(loss):
            return SignalReading(self.name, Level.OK, 0.0, self.threshold)
        level, sigma = _level_and_sigma(values, ROUNDING_FLOOR * self._largest)
        deviation = (loss - level) / sigma if sigma > 0 else 0.0
        if min(values) > 0 and loss > level:
            log_level, log_sigma = _log_level_and_sigma(values)
            deviation = min(deviation, (math.log(loss) - log_level) / log_sigma)
        spike = 0 < (1 + self.divergence_threshold) * level < loss
        if spike and deviation > SPIKE_SIGMA:
            threshold = min(SPIKE_SIGMA, self.threshold)
            return SignalReading(self.name, Level.CRITICAL, deviation, threshold)
        bounds = (self.threshold, 1.5 * self.threshold, 2 * self.threshold)
        return SignalReading(
            self.name, _level(deviation, bounds), deviation, self.threshold
        )

    def absorb(self, observation: Observation) -> None:
        """Add the loss, where it is known."""
        self._window.add(observation.loss)
        if math.isfinite(observation.loss):
            self._largest = max(self._largest, abs(observation.loss))

    def state_dict(self) -> dict[str, Any]:
        """The window and the largest magnitude seen."""
        return {"window": self._window.state_dict(), "largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change on a mismatch."""
        _expect_keys(self.name, state, ("window", "largest"))
        largest = _finite_number(self.name, "largest", state["largest"])
        _load_window(self.name, self._window, state["window"])
        self._largest = largest


class GradientExplosion:
    """Gradient norm over its running median.

    A norm that was accepted within the window is no explosion when it comes back, so
    heavy-tailed gradients raise their own threshold.
    """

    name = "gradient_explosion"

    def __init__(self, config: DivergenceConfig) -> None:
        self.multiplier = config.gradient_norm_multiplier
        self._window = _window(config)

    def read(self, observation: Observation) -> SignalReading:
        """Warning above the threshold, critical above three times it."""
        norm, median = observation.gradient_norm, self._window.median()
        few = len(self._window) < MIN_OBSERVATIONS
        if few or median <= 0 or not math.isfinite(norm):
            return SignalReading(self.name, Level.OK, 0.0, self.multiplier)
        ratio = norm / median
        threshold = max(self.multiplier, max(self._window.values) / median)
        bounds = (math.inf, threshold, EXPLOSION_FACTOR * threshold)
        if ratio > bounds[1]:
            return SignalReading(self.name, _level(ratio, bounds), ratio, threshold)
        return SignalReading(self.name, Level.OK, ratio, threshold)

    def absorb(self, observation: Observation) -> None:
        """Add the norm."""
        self._window.add(observation.gradient_norm)

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return {"window": self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change on a mismatch."""
        _expect_keys(self.name, state, ("window",))
        _load_window(self.name, self._window, state["window"])
