"""Gains of the drift move: one move per window, measured by the window behind it."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from hybridopt.config import DriftConfig, GainConfig, Prior
from hybridopt.types import DRIFT, Outcome
from tests.dynamics.stream import SIZES, noisy, observation, predictor, slopes

L = len(SIZES)
K = 4
STILL = GainConfig(rate=0.0)


def drifting(**changes):
    config = DriftConfig(**({"window_steps": K, "initial": 0.5} | changes))
    return predictor(Prior(), drift=config, gain=STILL)


def test_window_gains_follow_their_literal_twin():
    made = drifting(rate=0.3, maximum=1.2, minimum=0.2)
    rule = [0.5] * L
    first, measured = True, False
    window: list = []
    retreated, highest = set(), [0.0]
    sign = torch.tensor([1.0, 1, 1, -1, 0]).double().unsqueeze(1)
    for i, plain in enumerate(noisy(30, L, seed=5)):
        # Half-way the drift turns against the gradients.
        tilt = 0.1 if i < 16 else -0.1
        one = observation(i, plain.alignment * sign + tilt)
        made.observe(one)
        window.append(one)
        said = made.forecast(slopes(L))
        if len(window) < K:
            assert not said.turns_window
            assert not said.coefficients[:, DRIFT].any()
            continue
        cosines = []
        for index in range(L) if measured else ():
            dots = sum(-float(step.dots[index, DRIFT]) for step in window)
            square = sum(float(step.gradient_sq[index]) for step in window)
            norm = math.sqrt(square * float(one.basis_sq[index, DRIFT]))
            cosines.append(dots / norm)
        error = statistics.stdev(cosines) / math.sqrt(L) if cosines else 1.0
        retreats = bool(cosines) and statistics.mean(cosines) / error < -0.8
        retreated.add(retreats)
        for index, cosine in enumerate(cosines):
            factor = math.exp(0.3 * math.tanh(5 * cosine))
            factor = min(factor, 0.4) if retreats else factor
            rule[index] = min(max(rule[index] * factor, 0.2), 1.2)
        highest.append(max(rule))
        assert said.turns_window, i
        if first:
            # The start of a training says nothing about the way that it will take.
            assert not said.coefficients[:, DRIFT].any()
            first, window = False, []
            continue
        exact = torch.tensor(rule, dtype=torch.float64)
        assert torch.allclose(said.coefficients[:, DRIFT], exact, rtol=1e-9), i
        assert said.drift_gain == pytest.approx(sum(rule) / L)
        measured, window = True, []
    assert min(rule) < 0.5 < max(highest)
    assert retreated == {True, False}


@pytest.mark.parametrize(
    ("tilts", "first_gain"),
    [([-0.3] * L, 0.2), ([-0.3, 0.3, -0.3, 0.3, -0.1], 0.5), ([0.3] * L, 0.5)],
)
def test_first_direction_says_only_whether_to_begin_carefully(tilts, first_gain):
    made = drifting()
    first, tilt = None, torch.tensor(tilts).double().unsqueeze(1)
    for i, plain in enumerate(noisy(2 * K, L, seed=5)):
        made.observe(observation(i, 0.2 * plain.alignment + tilt))
        first = made.forecast(slopes(L)).coefficients[:, DRIFT]
    assert first.tolist() == pytest.approx([first_gain] * L)


def test_hold_follows_the_geometric_mean_of_gains_once_one_was_measured():
    made = drifting(hold=2.0)
    holds = []
    for one in noisy(6 * K, L, seed=5):
        made.observe(one)
        said = made.forecast(slopes(L))
        holds.append(said.hold)
        mean = math.exp(statistics.mean(math.log(g) for g in made.window.gains))
        measured = made.window.windows > 1
        expected = min(max(2.0 * (mean - 0.1), 0.0), 0.75) if measured else 0.0
        assert said.hold == pytest.approx(expected, rel=1e-12)
    assert holds[2 * K - 2] == 0.0 < holds[2 * K]
    assert drifting(hold=0.0).forecast(slopes(L)).hold == 0.0


def test_hold_ends_where_drift_does_not_pay():
    made = drifting(hold=2.0)
    for i, plain in enumerate(noisy(20 * K, L, seed=5)):
        made.observe(observation(i, 0.2 * plain.alignment - 0.2))
        made.forecast(slopes(L))
    assert made.forecast(slopes(L)).hold == 0.0
    assert made.state_dict()["window"]["measured"]


def test_window_turns_without_moving_before_warm_up_is_over():
    made = drifting()
    made.moving = False
    turns = 0
    for one in noisy(3 * K, L):
        made.observe(one)
        said = made.forecast(slopes(L))
        turns += said.turns_window
        assert not said.coefficients[:, DRIFT].any()
    assert turns == 3
    assert made.window.gains.tolist() == [0.5] * L


@pytest.mark.parametrize(
    "changes", [{"drift": DriftConfig(enabled=False)}, {"memory": "low"}]
)
def test_window_that_is_off_never_turns(changes):
    made = predictor(Prior(), **changes)
    for one in noisy(90, L):
        made.observe(one)
        said = made.forecast(slopes(L))
        assert not said.turns_window
        assert not said.coefficients[:, DRIFT].any()
        assert said.drift_gain == 0.0


def test_window_gains_shrink_after_a_rollback():
    made = drifting(minimum=0.02)
    made.feedback(Outcome(0, 0.0, 1, 1.0, True))
    assert made.window.gains.tolist() == [0.125] * L


def test_window_without_a_direction_leaves_its_gains():
    made = drifting()
    flat = torch.zeros(L, 2, dtype=torch.float64)
    for i in range(3 * K):
        made.observe(observation(i, flat, dots=flat, basis_sq=flat))
        made.forecast(slopes(L))
    assert made.window.gains.tolist() == [0.5] * L
