"""Six ways of noticing that training goes wrong, each a ``Signal``.

A signal compares one observation with what was accepted before. Statistics cover a
window of real steps, so that they follow a loss that falls by orders of magnitude, and
say nothing before they have seen enough. Only NaN and inf need no statistics.
"""

from __future__ import annotations

import math
from typing import Any

from hybridopt.config import DivergenceConfig, HybridConfig
from hybridopt.guard.state import build_window, expect_keys, load_window, mismatch
from hybridopt.guard.statistics import MIN_OBSERVATIONS, measure_rise, turning_share
from hybridopt.protocols import Signal
from hybridopt.types import Level, Observation, SignalReading

__all__ = [
    "GradientExplosion",
    "LossDeviation",
    "NonFinite",
    "Oscillation",
    "PredictionError",
    "VanishingGradient",
    "default_signals",
    "is_finite",
]

ROUNDING_FLOOR = 1e-10
"""Smallest sigma, relative to the largest loss seen: what is left of a perfectly
fitted loss is rounding."""
SPIKE_SIGMA = 3.0
"""Least deviation at which ``divergence_threshold`` counts."""
EXPLOSION_FACTOR = 3.0
"""Multiple of the explosion threshold that is critical."""


def is_finite(observation: Observation) -> bool:
    """Whether loss and gradient are usable.

    A nan loss or norm that comes with ``finite`` is not known rather than broken: the
    user stepped without a closure, or a validation measured no gradient.
    """
    unbounded = math.isinf(observation.loss) or math.isinf(observation.gradient_norm)
    return observation.finite and not unbounded


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
    """The monitor reads it at every step, whatever ``check_interval_steps`` says."""

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
        """Accept the empty state; CheckpointError on anything else."""
        expect_keys(self.name, state, ())


class LossDeviation:
    """How many standard deviations the loss lies above its recent level.

    Level and sigma are those of ``statistics.measure_rise``: free of the trend, so
    that a falling loss raises no alarm and hides none.
    """

    name = "loss_deviation"

    def __init__(self, config: DivergenceConfig, divergence_threshold: float) -> None:
        self.threshold = config.loss_sigma_threshold
        self.divergence_threshold = divergence_threshold
        self._window = build_window(config)
        self._largest = 0.0

    def read(self, observation: Observation) -> SignalReading:
        """Caution at the threshold, warning at 1.5 times, critical at twice.

        Also critical when the loss exceeds a positive level by more than
        ``divergence_threshold`` (relative) and by more than three sigma.
        """
        values, loss = self._window.values, observation.loss
        if len(values) < MIN_OBSERVATIONS or not math.isfinite(loss):
            return SignalReading(self.name, Level.OK, 0.0, self.threshold)
        floor = ROUNDING_FLOOR * self._largest
        normal, deviation = measure_rise(loss, values, floor)
        doubled = 0 < (1 + self.divergence_threshold) * normal < loss
        if doubled and deviation > SPIKE_SIGMA:
            threshold = min(SPIKE_SIGMA, self.threshold)
            return SignalReading(self.name, Level.CRITICAL, deviation, threshold)
        t = self.threshold
        level = _graded(deviation, caution=t, warning=1.5 * t, critical=2 * t)
        return SignalReading(self.name, level, deviation, t)

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
        expect_keys(self.name, state, ("window", "largest"))
        largest = state["largest"]
        if not isinstance(largest, float) or not math.isfinite(largest):
            raise mismatch(self.name, f"largest={largest!r}: must be a finite number")
        load_window(self.name, self._window, state["window"])
        self._largest = largest


class GradientExplosion:
    """Gradient norm over its running median.

    A norm that was accepted within the window is no explosion when it comes back, so
    heavy-tailed gradients raise their own threshold.
    """

    name = "gradient_explosion"

    def __init__(self, config: DivergenceConfig) -> None:
        self.multiplier = config.gradient_norm_multiplier
        self._window = build_window(config)

    def read(self, observation: Observation) -> SignalReading:
        """Warning above the threshold, critical above three times it."""
        norm, median = observation.gradient_norm, self._window.median()
        few = len(self._window) < MIN_OBSERVATIONS
        if few or median <= 0 or not math.isfinite(norm):
            return SignalReading(self.name, Level.OK, 0.0, self.multiplier)
        threshold = max(self.multiplier, max(self._window.values) / median)
        ratio = norm / median
        level = _graded(ratio, warning=threshold, critical=EXPLOSION_FACTOR * threshold)
        return SignalReading(self.name, level, ratio, threshold)

    def absorb(self, observation: Observation) -> None:
        """Add the norm, where it is known."""
        self._window.add(observation.gradient_norm)

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return {"window": self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change on a mismatch."""
        expect_keys(self.name, state, ("window",))
        load_window(self.name, self._window, state["window"])


class VanishingGradient:
    """Gradient norm below a fixed bound: caution, since directions mean nothing."""

    name = "vanishing_gradient"

    def __init__(self, config: DivergenceConfig) -> None:
        self.threshold = config.vanishing_gradient_threshold

    def read(self, observation: Observation) -> SignalReading:
        """Caution below the threshold; an unknown norm is not small."""
        norm = observation.gradient_norm
        level = Level.CAUTION if norm < self.threshold else Level.OK
        return SignalReading(self.name, level, norm, self.threshold)

    def absorb(self, observation: Observation) -> None:
        """Nothing to learn: the bound is absolute."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the judgement needs no history."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state; CheckpointError on anything else."""
        expect_keys(self.name, state, ())


class PredictionError:
    """How far the loss lies above what the predictor expected, in its own sigma.

    Only the bad side counts: a loss lower than expected endangers nothing. An
    expectation without a positive sigma says nothing. Sigma is at least one percent of
    the expected loss, since a predictor that claims more would alarm on rounding.
    """

    name = "prediction_error"

    def __init__(self, config: DivergenceConfig) -> None:
        self.threshold = config.prediction_error_threshold
        self._count = 0

    def read(self, observation: Observation) -> SignalReading:
        """Caution above the threshold, warning above twice it."""
        expected, sigma = observation.expected_loss, observation.expected_loss_sigma
        excess = observation.loss - expected
        known = math.isfinite(excess) and math.isfinite(sigma) and sigma > 0
        if self._count < MIN_OBSERVATIONS or not known:
            return SignalReading(self.name, Level.OK, 0.0, self.threshold)
        error = excess / max(sigma, 0.01 * abs(expected))
        level = _graded(error, caution=self.threshold, warning=2 * self.threshold)
        return SignalReading(self.name, level, error, self.threshold)

    def absorb(self, observation: Observation) -> None:
        """Count the observation; the predictor's first expectations are guesses."""
        self._count = min(self._count + 1, MIN_OBSERVATIONS)

    def state_dict(self) -> dict[str, Any]:
        """How many observations were seen, as far as it matters."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change on a mismatch."""
        expect_keys(self.name, state, ("count",))
        count = state["count"]
        if not isinstance(count, int) or not 0 <= count <= MIN_OBSERVATIONS:
            rule = f"count={count!r}: must be an integer from 0 to {MIN_OBSERVATIONS}"
            raise mismatch(self.name, rule)
        self._count = count


class Oscillation:
    """Share of sign changes between successive loss differences over the window.

    Independent noise turns at two places in three; the threshold is raised to what it
    hardly ever exceeds, so that a short window or plain noise raises no alarm.
    """

    name = "oscillation"

    def __init__(self, config: DivergenceConfig) -> None:
        self.threshold = config.oscillation_threshold
        self._window = build_window(config)

    def read(self, observation: Observation) -> SignalReading:
        """Caution above the threshold, this observation's loss included."""
        values, loss = self._window.values, observation.loss
        if len(values) < MIN_OBSERVATIONS or not math.isfinite(loss):
            return SignalReading(self.name, Level.OK, 0.0, self.threshold)
        share, chance = turning_share((*values, loss))
        threshold = max(self.threshold, chance)
        return SignalReading(
            self.name, _graded(share, caution=threshold), share, threshold
        )

    def absorb(self, observation: Observation) -> None:
        """Add the loss, where it is known."""
        self._window.add(observation.loss)

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return {"window": self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change on a mismatch."""
        expect_keys(self.name, state, ("window",))
        load_window(self.name, self._window, state["window"])


def _graded(
    value: float,
    *,
    caution: float = math.inf,
    warning: float = math.inf,
    critical: float = math.inf,
) -> Level:
    """The worst level whose bound ``value`` exceeds; nan exceeds none."""
    if value > critical:
        return Level.CRITICAL
    if value > warning:
        return Level.WARNING
    return Level.CAUTION if value > caution else Level.OK
