from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from hybridopt.config import DivergenceConfig
from hybridopt.guard.signals import (
    GradientExplosion,
    LossDeviation,
    NonFinite,
    Oscillation,
    PredictionError,
    VanishingGradient,
)
from hybridopt.protocols import Signal
from hybridopt.types import Level
from tests.guard.observations import observation

CONFIG = DivergenceConfig()
NAN = float("nan")


def noisy(signal: Signal, count: int = 60, noise: float = 0.1) -> None:
    """Absorb a steady loss of 2 with Gaussian noise and gradient norm about 1."""
    rng = random.Random(0)
    for step in range(count):
        loss, norm = 2.0 + noise * rng.gauss(0, 1), math.exp(0.2 * rng.gauss(0, 1))
        signal.absorb(observation(step, loss, norm))


def loss_level(signal: LossDeviation, loss: float) -> Level:
    return signal.read(observation(loss=loss)).level


# -- non-finite ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "norm", "finite"),
    [
        (NAN, NAN, False),
        (1.0, NAN, False),
        (math.inf, 1.0, True),
        (1.0, math.inf, True),
    ],
)
def test_non_finite_is_critical_from_the_first_step(
    loss: float, norm: float, finite: bool
) -> None:
    reading = NonFinite().read(observation(0, loss, norm, finite=finite))
    assert reading.level is Level.CRITICAL
    assert reading.value == 1.0


def test_non_finite_takes_a_missing_loss_or_norm_for_unknown() -> None:
    assert NonFinite().read(observation(0, NAN, 1.0)).level is Level.OK
    assert NonFinite().read(observation(0, 1.0, NAN)).level is Level.OK


# -- loss deviation --------------------------------------------------------------------


def test_loss_deviation_rises_through_the_levels() -> None:
    signal = LossDeviation(CONFIG, divergence_threshold=1.0)
    noisy(signal)
    one = signal.read(observation(loss=2.1)).value
    two = signal.read(observation(loss=2.2)).value
    sigma = 0.1 / (two - one)
    level = 2.1 - one * sigma
    for times, expected in (
        (3.9, Level.OK),
        (4.1, Level.CAUTION),
        (6.1, Level.WARNING),
        (8.1, Level.CRITICAL),
    ):
        # The logarithmic reading is a little milder, hence the second order term.
        loss = level * math.exp(times * sigma / level)
        assert loss_level(signal, max(loss, level + times * sigma)) is expected


def test_loss_deviation_is_critical_when_the_loss_doubles_and_is_a_spike() -> None:
    strict = LossDeviation(DivergenceConfig(loss_sigma_threshold=1000.0), 1.0)
    noisy(strict)
    assert loss_level(strict, 3.9) is Level.OK
    assert loss_level(strict, 4.3) is Level.CRITICAL
    assert LossDeviation(CONFIG, 1.0).read(observation(loss=9.0)).level is Level.OK


def test_loss_deviation_leaves_doubling_alone_when_noise_explains_it() -> None:
    signal = LossDeviation(DivergenceConfig(loss_sigma_threshold=1000.0), 1.0)
    noisy(signal, noise=1.0)
    assert signal.read(observation(loss=4.5)).value < 3.0
    assert loss_level(signal, 4.5) is Level.OK


def test_loss_deviation_ignores_falls_and_unknown_losses() -> None:
    signal = LossDeviation(CONFIG, 1.0)
    noisy(signal)
    assert loss_level(signal, -50.0) is Level.OK
    assert loss_level(signal, NAN) is Level.OK


def test_loss_deviation_says_nothing_before_eight_losses() -> None:
    signal = LossDeviation(CONFIG, 1.0)
    noisy(signal, 7)
    signal.absorb(observation(loss=NAN))
    assert loss_level(signal, 1e6) is Level.OK
    signal.absorb(observation(loss=2.0))
    assert loss_level(signal, 1e6) is Level.CRITICAL


def test_loss_deviation_notices_a_jump_while_the_loss_still_falls() -> None:
    signal = LossDeviation(CONFIG, 1.0)
    for step in range(50):
        signal.absorb(observation(step, 10.0 * 0.98**step))
    last = 10.0 * 0.98**49
    assert loss_level(signal, last) is Level.OK
    assert loss_level(signal, 3 * last) is Level.CRITICAL


def test_loss_deviation_notices_jumps_of_a_negative_loss() -> None:
    signal = LossDeviation(CONFIG, 1.0)
    rng = random.Random(1)
    for step in range(50):
        signal.absorb(observation(step, -5.0 + 0.1 * rng.gauss(0, 1)))
    assert loss_level(signal, -4.9) is Level.OK
    assert loss_level(signal, -3.0) is Level.CRITICAL


def student(rng: random.Random, df: float) -> float:
    return rng.gauss(0, 1) / math.sqrt(rng.gammavariate(df / 2, 2 / df))


QUIET: dict[str, Callable[[int, random.Random], float]] = {
    "smooth, falls by a million": lambda t, r: math.exp(-14 * t / 2000),
    "smooth with ripples": lambda t, r: (
        math.exp(-t / 140) * (1 + 0.3 * math.sin(t / 3))
    ),
    "power law": lambda t, r: (t + 1.0) ** -2,
    "perfect fit": lambda t, r: 1 / (1 + t) if t < 500 else 1e-13 * r.random(),
    "rounding noise": lambda t, r: 2.0 * (1 + 1e-7 * r.gauss(0, 1)),
    "five per cent": lambda t, r: 2 + 3 * math.exp(-t / 50) + 0.1 * r.gauss(0, 1),
    "exponential": lambda t, r: r.expovariate(1.0),
}


@pytest.mark.parametrize("name", QUIET)
def test_loss_deviation_does_not_cry_wolf_on(name: str) -> None:
    signal, rng = LossDeviation(CONFIG, 1.0), random.Random(2)
    alarms = 0
    for step in range(2000):
        seen = observation(step, QUIET[name](step, rng))
        alarms += signal.read(seen).level > Level.OK
        signal.absorb(seen)
    assert alarms <= 2


NOISY: dict[str, Callable[[random.Random], float]] = {
    "thirty per cent": lambda r: 2 + 0.6 * r.gauss(0, 1),
    "log-normal": lambda r: math.exp(0.5 * r.gauss(0, 1)),
    "wide log-normal": lambda r: math.exp(r.gauss(0, 1)),
    "Student, 3 degrees": lambda r: 3 + 0.3 * student(r, 3),
    "negative Student, 2 degrees": lambda r: -3 + 0.3 * student(r, 2),
    "outliers": lambda r: 2 + r.gauss(0, 1) * (1.0 if r.random() < 0.05 else 0.1),
}


@pytest.mark.parametrize("name", NOISY)
def test_loss_deviation_is_rarely_critical_in_heavy_noise(name: str) -> None:
    signal, rng = LossDeviation(CONFIG, 1.0), random.Random(3)
    critical = 0
    for step in range(3000):
        seen = observation(step, NOISY[name](rng))
        critical += signal.read(seen).level is Level.CRITICAL
        signal.absorb(seen)
    assert critical <= 15  # 0.5 %; measured 0 to 0.3 %


# -- gradients -------------------------------------------------------------------------


def test_gradient_explosion_warns_then_is_critical() -> None:
    signal = GradientExplosion(CONFIG)
    noisy(signal)
    levels = [signal.read(observation(gradient_norm=n)).level for n in (5, 15, 50)]
    assert levels == [Level.OK, Level.WARNING, Level.CRITICAL]


def test_gradient_explosion_accepts_a_norm_that_it_has_accepted() -> None:
    signal = GradientExplosion(CONFIG)
    noisy(signal)
    spike = observation(gradient_norm=15.0)
    assert signal.read(spike).level is Level.WARNING
    signal.absorb(spike)
    assert signal.read(spike).level is Level.OK
    assert signal.read(observation(gradient_norm=60.0)).level is Level.CRITICAL


def test_gradient_explosion_follows_a_norm_that_falls_by_a_million() -> None:
    signal = GradientExplosion(CONFIG)
    for step in range(2000):
        seen = observation(step, gradient_norm=math.exp(-14 * step / 2000))
        assert signal.read(seen).level is Level.OK
        signal.absorb(seen)


def test_gradient_explosion_cannot_compare_with_nothing() -> None:
    signal = GradientExplosion(CONFIG)
    for step in range(20):
        signal.absorb(observation(step, gradient_norm=0.0))
    assert signal.read(observation(gradient_norm=1.0)).level is Level.OK
    assert signal.read(observation(gradient_norm=NAN)).level is Level.OK


def test_vanishing_gradient_is_a_caution_from_the_first_step() -> None:
    signal = VanishingGradient(CONFIG)
    levels = [
        signal.read(observation(gradient_norm=n)).level for n in (0.0, 1e-11, NAN)
    ]
    assert levels == [Level.CAUTION, Level.OK, Level.OK]


def test_vanishing_gradient_with_threshold_zero_never_speaks() -> None:
    signal = VanishingGradient(DivergenceConfig(vanishing_gradient_threshold=0.0))
    assert signal.read(observation(gradient_norm=0.0)).level is Level.OK


# -- prediction error ------------------------------------------------------------------


def expected(loss: float, sigma: float = 0.1) -> Level:
    signal = PredictionError(CONFIG)
    noisy(signal, 8)
    seen = observation(loss=loss, expected_loss=2.0, expected_loss_sigma=sigma)
    return signal.read(seen).level


def test_prediction_error_counts_only_losses_above_the_expected() -> None:
    assert expected(2.29) is Level.OK
    assert expected(2.31) is Level.CAUTION
    assert expected(2.61) is Level.WARNING
    assert expected(0.0) is Level.OK


def test_prediction_error_has_a_floor_under_sigma() -> None:
    assert expected(2.05, sigma=1e-9) is Level.OK
    assert expected(2.07, sigma=1e-9) is Level.CAUTION


@pytest.mark.parametrize("sigma", [NAN, 0.0, -1.0, math.inf])
def test_prediction_error_ignores_an_expectation_without_sigma(sigma: float) -> None:
    assert expected(1e9, sigma) is Level.OK


def test_prediction_error_says_nothing_early_or_without_a_loss() -> None:
    seen = observation(loss=99.0, expected_loss=2.0, expected_loss_sigma=0.1)
    assert PredictionError(CONFIG).read(seen).level is Level.OK
    assert expected(NAN) is Level.OK


# -- oscillation -----------------------------------------------------------------------


def test_oscillation_notices_an_alternating_loss() -> None:
    signal = Oscillation(CONFIG)
    for step in range(60):
        signal.absorb(observation(step, 2.0 + 0.1 * (-1) ** step))
    reading = signal.read(observation(loss=2.1))
    assert reading.level is Level.CAUTION
    assert reading.value == 1.0


@pytest.mark.parametrize("window", [4, 8, 16, 50])
def test_oscillation_takes_noise_for_noise(window: int) -> None:
    signal = Oscillation(DivergenceConfig(window_steps=window))
    rng, alarms = random.Random(4), 0
    for step in range(3000):
        seen = observation(step, rng.gauss(0, 1))
        alarms += signal.read(seen).level > Level.OK
        signal.absorb(seen)
    assert alarms <= 10


def test_oscillation_ignores_a_loss_that_stands_still() -> None:
    signal = Oscillation(CONFIG)
    for step in range(60):
        signal.absorb(observation(step, 2.0))
    assert signal.read(observation(loss=2.0)).level is Level.OK
