from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridopt.errors import CheckpointError
from hybridopt.history import RunningMoments, Window

NUMBERS = st.floats(-1e6, 1e6)


# -- RunningMoments --------------------------------------------------------------------


def test_moments_are_unknown_before_there_are_values() -> None:
    moments = RunningMoments(0.9)
    assert math.isnan(moments.mean)
    assert math.isnan(moments.std)
    moments.add(3.0)
    assert moments.mean == pytest.approx(3.0)
    assert math.isnan(moments.std)
    assert math.isnan(moments.standard_error)


@given(st.lists(NUMBERS, min_size=2, max_size=30), st.floats(0.05, 0.99))
def test_moments_are_those_of_the_weighted_sample(
    values: list[float], memory: float
) -> None:
    moments = RunningMoments(memory)
    for value in values:
        moments.add(value)
    weights = [memory ** (len(values) - 1 - i) for i in range(len(values))]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    square = sum(w * v * v for w, v in zip(weights, values, strict=True)) / total
    size = max(abs(v) for v in values)
    assert moments.mean == pytest.approx(mean, rel=1e-6, abs=1e-9 * (1 + size))
    # The variance is a difference of squares: only its absolute error is bounded.
    variance = max(square - mean * mean, 0.0)
    assert moments.std**2 == pytest.approx(variance, abs=1e-9 * (1 + size * size))


def test_moments_of_a_constant_have_no_deviation() -> None:
    moments = RunningMoments(0.8)
    for _ in range(50):
        moments.add(2.5)
    assert moments.mean == pytest.approx(2.5)
    assert moments.std == pytest.approx(0.0, abs=1e-6)


def test_moments_standard_error_is_the_deviation_of_the_mean() -> None:
    rng, means, errors = random.Random(0), [], []
    for _ in range(400):
        moments = RunningMoments(0.9)
        for _ in range(80):
            moments.add(rng.gauss(1.0, 2.0))
        means.append(moments.mean)
        errors.append(moments.standard_error)
    assert statistics.fmean(means) == pytest.approx(1.0, abs=0.1)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(means), rel=0.15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_moments_ignore_what_is_not_finite(bad: float) -> None:
    moments = RunningMoments(0.9)
    moments.add(1.0)
    before = moments.state_dict()
    moments.add(bad)
    assert moments.state_dict() == before


@given(st.lists(NUMBERS, max_size=10), st.lists(NUMBERS, min_size=2, max_size=10))
def test_moments_state_continues_exactly(head: list[float], tail: list[float]) -> None:
    one, other = RunningMoments(0.9), RunningMoments(0.9)
    for value in head:
        one.add(value)
    other.load_state_dict(one.state_dict())
    for value in tail:
        one.add(value)
        other.add(value)
    assert one.state_dict() == other.state_dict()
    assert (one.mean, one.std) == (other.mean, other.std)


# -- Window ----------------------------------------------------------------------------


@given(st.lists(NUMBERS, max_size=20), st.integers(1, 8))
def test_window_keeps_the_newest_values(values: list[float], size: int) -> None:
    window = Window(size)
    for value in values:
        window.add(value)
    assert window.values == tuple(values[-size:])
    assert len(window) == min(size, len(values))
    assert window.full is (len(values) >= size)


@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_window_median_is_the_middle(values: list[float]) -> None:
    window = Window(9)
    for value in values:
        window.add(value)
    assert window.median() == pytest.approx(statistics.median(values))


def test_window_is_empty_at_first_and_after_clear() -> None:
    window = Window(3)
    assert math.isnan(window.median())
    window.add(1.0)
    window.clear()
    assert len(window) == 0
    assert math.isnan(window.median())
    assert not window.full


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_window_ignores_what_is_not_finite(bad: float) -> None:
    window = Window(3)
    window.add(1.0)
    window.add(bad)
    assert window.values == (1.0,)


def test_window_state_continues_exactly() -> None:
    one, other = Window(3), Window(3)
    for value in (1.0, 2.0, 3.0, 4.0):
        one.add(value)
    other.add(9.0)
    other.load_state_dict(one.state_dict())
    for window in (one, other):
        window.add(5.0)
    assert one.values == other.values == (3.0, 4.0, 5.0)


def test_window_refuses_more_values_than_fit_and_keeps_its_own() -> None:
    window = Window(2)
    window.add(7.0)
    with pytest.raises(
        CheckpointError, match="window of 3 values: must hold at most 2"
    ):
        window.load_state_dict({"values": [1.0, 2.0, 3.0]})
    assert window.values == (7.0,)
