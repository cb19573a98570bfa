"""Every signal goes through one suite; a new one is enrolled by a line in SIGNALS."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest

from hybridopt.config import DivergenceConfig
from hybridopt.errors import CheckpointError
from hybridopt.guard.signals import (
    GradientExplosion,
    LossDeviation,
    NonFinite,
    Oscillation,
    PredictionError,
    VanishingGradient,
)
from hybridopt.protocols import Signal
from hybridopt.types import Level, Observation
from tests.guard.observations import observation

CONFIG = DivergenceConfig(window_steps=24)
SIGNALS: dict[str, Callable[[], Signal]] = {
    "non_finite": NonFinite,
    "loss_deviation": lambda: LossDeviation(CONFIG, 1.0),
    "gradient_explosion": lambda: GradientExplosion(CONFIG),
    "vanishing_gradient": lambda: VanishingGradient(CONFIG),
    "prediction_error": lambda: PredictionError(CONFIG),
    "oscillation": lambda: Oscillation(CONFIG),
}
ALARMING = {
    "non_finite": observation(0, finite=False),
    "loss_deviation": observation(0, 50.0),
    "gradient_explosion": observation(0, gradient_norm=1e4),
    "vanishing_gradient": observation(0, gradient_norm=0.0),
    "prediction_error": observation(0, 9.0, expected_loss=1.0, expected_loss_sigma=0.1),
    "oscillation": observation(0, 2.5),
}
STATISTICAL = (
    "loss_deviation",
    "gradient_explosion",
    "prediction_error",
    "oscillation",
)


def alternating(step: int) -> Observation:
    """A loss that goes up and down by turns, so that every signal has its material."""
    rng = random.Random(step)
    loss = 2.0 + 0.3 * (-1) ** step + 0.01 * rng.random()
    return observation(step, loss, 1.0 + 0.1 * rng.random())


def lived(name: str, count: int = 30) -> Signal:
    signal = SIGNALS[name]()
    for step in range(count):
        signal.absorb(alternating(step))
    return signal


@pytest.fixture(params=SIGNALS)
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def test_signal_satisfies_the_protocol_and_names_itself(name: str) -> None:
    signal = SIGNALS[name]()
    assert isinstance(signal, Signal)
    assert signal.name == name
    assert signal.read(observation()).name == name


def test_signal_raises_its_alarm(name: str) -> None:
    reading = lived(name).read(ALARMING[name])
    assert reading.level > Level.OK


def test_signal_is_quiet_on_what_is_normal(name: str) -> None:
    signal, rng = SIGNALS[name](), random.Random(0)
    for step in range(30):
        signal.absorb(observation(step, 2 + 0.1 * rng.gauss(0, 1)))
    assert signal.read(observation(30, 2.0)).level is Level.OK


@pytest.mark.parametrize("name", STATISTICAL)
def test_signal_with_statistics_is_quiet_before_eight_observations(name: str) -> None:
    signal = SIGNALS[name]()
    for step in range(8):
        assert signal.read(ALARMING[name]).level is Level.OK
        signal.absorb(alternating(step))


def test_signal_read_is_pure(name: str) -> None:
    signal = lived(name)
    before = copy.deepcopy(signal.state_dict())
    first = signal.read(ALARMING[name])
    assert signal.read(ALARMING[name]) == first
    assert signal.state_dict() == before


def test_signal_accepts_a_step_without_a_closure(name: str) -> None:
    signal = lived(name)
    unknown = observation(31, float("nan"))
    assert signal.read(unknown).level is Level.OK
    signal.absorb(unknown)
    assert signal.read(ALARMING[name]).level is lived(name).read(ALARMING[name]).level


def test_signal_state_continues_exactly(name: str) -> None:
    signal, other = lived(name), SIGNALS[name]()
    other.load_state_dict(copy.deepcopy(signal.state_dict()))
    for step in range(30, 45):
        for seen in (alternating(step), ALARMING[name]):
            assert other.read(seen) == signal.read(seen)
        signal.absorb(alternating(step))
        other.absorb(alternating(step))
    assert other.state_dict() == signal.state_dict()


def test_signal_state_is_a_copy(name: str) -> None:
    signal = lived(name)
    state = signal.state_dict()
    before = copy.deepcopy(state)
    for step in range(20):
        signal.absorb(observation(step, 70.0 + step, 9.0))
    assert state == before


@pytest.mark.parametrize(
    "broken",
    [
        {"nonsense": 1},
        None,
        {"window": {"values": [float("nan")]}, "largest": 1.0, "count": -1},
        {"window": {"values": [float("nan")]}, "largest": 1.0},
        {"window": {"values": [float("nan")]}},
        {"window": {"values": [1.0] * 25}, "largest": 1.0},
        {"window": {"values": [1.0] * 25}},
        {"window": None},
        {"window": {"values": []}, "largest": "big"},
        {"count": 9},
    ],
)
def test_signal_refuses_broken_state_and_keeps_its_own(
    name: str, broken: object
) -> None:
    signal = lived(name)
    before = copy.deepcopy(signal.state_dict())
    with pytest.raises(CheckpointError):
        signal.load_state_dict(broken)  # type: ignore[arg-type]
    assert signal.state_dict() == before
