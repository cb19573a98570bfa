"""Interpolation at equal loss, its limits, and bootstrap intervals."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks import estimates
from benchmarks.estimates import (
    Estimate,
    Outcome,
    amount_at_loss,
    first_reach,
    geometric_mean,
    iso_loss_speedup,
    loss_at_amount,
    ratio,
    target_speedup,
)

CURVE = [Outcome(4.0, 10.0), Outcome(3.0, 20.0), Outcome(2.0, 40.0)]


def test_amount_interpolates_log_linearly():
    amount, bound = amount_at_loss(CURVE, 2.5)
    assert amount == pytest.approx(math.sqrt(20 * 40))
    assert bound == "exact"


@pytest.mark.parametrize(("loss", "amount"), [(4.0, 10.0), (3.0, 20.0), (2.0, 40.0)])
def test_amount_hits_the_measured_points(loss, amount):
    assert amount_at_loss(CURVE, loss) == (pytest.approx(amount), "exact")


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (1.0, (40.0, "at_least")),
        (9.0, (10.0, "at_most")),
        (math.inf, (10.0, "at_most")),
    ],
)
def test_amount_never_extrapolates(loss, expected):
    assert amount_at_loss(CURVE, loss) == expected


def test_amount_uses_the_running_minimum_of_a_noisy_curve():
    noisy = [Outcome(4.0, 10.0), Outcome(2.0, 20.0), Outcome(3.0, 40.0)]
    amount, bound = amount_at_loss(noisy, 2.5)
    assert 10.0 < amount < 20.0
    assert bound == "exact"
    # Beyond its best the curve's whole range is what the arm is known to beat.
    assert amount_at_loss(noisy, 1.5) == (40.0, "at_least")


def test_baseline_against_itself_is_one():
    rows = [[point, point] for point in CURVE]
    estimate = iso_loss_speedup(rows, rows[1])
    assert estimate.value == pytest.approx(1.0)
    assert estimate.bound == "exact"
    assert estimate.interval == (pytest.approx(1.0), pytest.approx(1.0))


def test_speedup_is_baseline_amount_over_own_amount():
    rows = [[point] for point in CURVE]
    estimate = iso_loss_speedup(rows, [Outcome(2.0, 8.0)])
    assert estimate.value == pytest.approx(5.0)
    assert math.isnan(estimate.interval[0])
    assert str(estimate) == "5.00x"


def test_speedup_beyond_the_range_says_so():
    rows = [[point] for point in CURVE]
    assert str(iso_loss_speedup(rows, [Outcome(1.0, 10.0)])) == "> 4.00x"
    assert str(iso_loss_speedup(rows, [Outcome(5.0, 20.0)])) == "< 0.50x"


def test_pairing_cancels_what_seeds_share():
    """A shift common to baseline and arm of a seed must not widen the interval."""
    generator = random.Random(1)
    shifts = [generator.gauss(0.0, 1.0) for _ in range(12)]
    rows = [[Outcome(p.loss + s, p.amount) for s in shifts] for p in CURVE]
    arm = [Outcome(2.5 + s, 10.0) for s in shifts]
    low, high = iso_loss_speedup(rows, arm).interval
    assert high - low < 1e-9
    unpaired = iso_loss_speedup(rows, [*arm[1:], arm[0]]).interval
    assert unpaired[1] - unpaired[0] > 0.05


def test_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(estimates, "REPLICATES", 200)
    generator = random.Random(0)
    covered = 0
    for trial in range(60):
        arm = [Outcome(2.5 + generator.gauss(0, 0.05), 10.0) for _ in range(20)]
        rows = [[point] * 20 for point in CURVE]
        low, high = iso_loss_speedup(rows, arm, seed=trial).interval
        covered += low <= math.sqrt(20 * 40) / 10 <= high
    assert 48 <= covered <= 60


def test_unequal_seeds_are_refused():
    with pytest.raises(ValueError, match="same seeds"):
        iso_loss_speedup([[CURVE[0]]], [CURVE[0], CURVE[1]])


def test_first_reach_interpolates_between_evaluations():
    assert first_reach(CURVE, 2.5) == pytest.approx(math.sqrt(20 * 40))
    assert first_reach(CURVE, 4.5) == 10.0
    assert first_reach(CURVE, 1.0) is None


def test_target_speedup_is_the_geometric_mean_over_seeds():
    estimate = target_speedup([80.0, 320.0], [40.0, 40.0], [50.0, 60.0])
    assert estimate.value == pytest.approx(4.0)
    assert estimate.bound == "exact"
    low, high = estimate.interval
    assert (low, high) == (pytest.approx(2.0), pytest.approx(8.0))


def test_target_never_reached_is_an_upper_bound():
    estimate = target_speedup([20.0], [None], [40.0])
    assert (estimate.value, estimate.bound) == (pytest.approx(0.5), "at_most")


def test_ratio_of_two_arms_cancels_the_baseline():
    rows = [[point, point] for point in CURVE]
    fast = iso_loss_speedup(rows, [Outcome(2.0, 10.0)] * 2, seed=3)
    slow = iso_loss_speedup(rows, [Outcome(2.0, 20.0)] * 2, seed=3)
    quotient = ratio(slow, fast)
    assert quotient.value == pytest.approx(0.5)
    assert quotient.interval == (pytest.approx(0.5), pytest.approx(0.5))


@pytest.mark.parametrize(
    ("arm", "reference", "bound"),
    [
        ("exact", "exact", "exact"),
        ("at_least", "exact", "at_least"),
        ("exact", "at_least", "at_most"),
        ("exact", "at_most", "at_least"),
        ("at_most", "at_least", "at_most"),
        ("at_most", "at_most", "unclear"),
        ("at_least", "at_least", "unclear"),
    ],
)
def test_ratio_of_bounds_claims_no_more_than_it_knows(arm, reference, bound):
    assert ratio(Estimate(2.0, arm, ()), Estimate(1.0, reference, ())).bound == bound


def test_loss_of_a_shortened_schedule_is_between_its_neighbours():
    assert loss_at_amount(CURVE, 20.0) == pytest.approx(3.0)
    assert loss_at_amount(CURVE, math.sqrt(20 * 40)) == pytest.approx(2.5)
    assert math.isnan(loss_at_amount(CURVE, 9.0))
    assert math.isnan(loss_at_amount(CURVE, 41.0))


def test_geometric_mean_keeps_the_pessimistic_bound():
    exact = Estimate(4.0, "exact", (4.0, 4.0))
    beyond = Estimate(1.0, "at_least", (1.0, 9.0))
    short = Estimate(1.0, "at_most", (1.0, 1.0))
    assert geometric_mean([exact, beyond]).bound == "at_least"
    mean = geometric_mean([exact, beyond, short])
    assert mean.bound == "at_most"
    assert mean.value == pytest.approx(4.0 ** (1 / 3))
    assert len(mean.replicates) == 2
