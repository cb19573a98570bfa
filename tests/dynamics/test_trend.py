"""Host-side statistics: the loss trend, the efficiency, the gate."""

from __future__ import annotations

import math

import pytest
import torch

from hybridopt.dynamics.trend import Efficiency, Gate, Honesty, LossTrend


def test_trend_knows_nothing_before_the_first_loss():
    trend = LossTrend()
    assert math.isnan(trend.expected)
    assert math.isnan(trend.sigma)


def test_trend_follows_its_error_correction_form():
    trend, level, slope, residuals = LossTrend(), 1.0, 0.0, []
    losses = [1.0, 0.8, 0.9, 0.4, 0.5]
    for loss in losses:
        if trend.count:
            residuals.append(loss - level - slope)
            level, slope = (
                level + slope + 0.2 * residuals[-1],
                slope + 0.02 * residuals[-1],
            )
        trend.add(loss)
        assert trend.expected == pytest.approx(level + slope)
    weights = [0.95 ** (3 - i) for i in range(4)]
    pairs = zip(weights, residuals, strict=True)
    square = sum(w * r * r for w, r in pairs) / sum(weights)
    assert trend.sigma == pytest.approx(math.sqrt(square))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e200])
def test_trend_ignores_what_is_no_loss(loss):
    trend = LossTrend()
    for value in (3.0, 2.0, 1.0):
        trend.add(value)
    expected = trend.expected
    trend.add(loss)
    assert trend.expected == expected
    assert math.isnan(trend.surprise)


def test_trend_surprise_is_in_the_sigma_before_it():
    trend = LossTrend()
    for value in (3.0, 2.0, 2.5):
        trend.add(value)
    expected, sigma = trend.expected, trend.sigma
    trend.add(5.0)
    assert trend.surprise == pytest.approx((5.0 - expected) / sigma)


def test_efficiency_takes_no_sample_from_an_uphill_beginning():
    efficiency = Efficiency()
    for begin in (0.0, -1.0, math.nan, math.inf):
        efficiency.add(begin, 1.0)
    efficiency.add(1.0, math.nan)
    assert efficiency.mean == Efficiency.UNKNOWN_MEAN


def test_gate_is_closed_before_the_second_move():
    gate = Gate()
    assert gate.open == 0.0
    gate.add(1.0, 1.0, 1.0)
    assert gate.open == 0.0
    gate.add(1.0, 1.0, 1.0)
    assert gate.open == 1.0


def test_gate_opens_with_the_significance_of_the_cosine():
    opened = []
    for shift in (-0.1, 0.05, 0.08, 0.5):
        gate = Gate()
        for i in range(60):
            gate.add(shift + (0.3 if i % 2 else -0.3), 4.0, 0.25)
        opened.append(gate.open)
    assert opened[0] == 0.0
    assert 0.0 < opened[1] < opened[2] < 1.0
    assert opened[3] == 1.0


def test_gate_ignores_moves_without_length():
    gate = Gate()
    for _ in range(5):
        gate.add(1.0, 0.0, 1.0)
        gate.add(math.nan, 1.0, 1.0)
        gate.add(1.0, math.inf, 0.0)
    assert gate.open == 0.0


def test_honesty_trusts_a_loss_that_falls_as_promised():
    generator = torch.Generator().manual_seed(0)
    honesty = Honesty()
    for step in range(300):
        noise = 0.1 * float(torch.randn((), generator=generator))
        honesty.add(5.0 - 0.01 * step + noise, 0.008)
        assert honesty.trusted or step < 40


def test_honesty_doubts_promises_that_no_loss_keeps():
    honesty = Honesty()
    for step in range(60):
        honesty.add(1.0 + 0.05 * math.sin(step), 0.3)
    assert not honesty.trusted


def test_honesty_forgives_one_jump_of_the_loss():
    generator = torch.Generator().manual_seed(1)
    honesty = Honesty()
    for step in range(120):
        noise = 0.05 * float(torch.randn((), generator=generator))
        jump = 3.0 if step >= 60 else 0.0
        honesty.add(5.0 - 0.01 * step + noise + jump, 0.005)
        if step > 60:
            assert honesty.trusted


def test_honesty_knows_nothing_without_losses():
    honesty = Honesty()
    for _ in range(50):
        honesty.add(math.nan, 1.0)
    assert honesty.trusted
