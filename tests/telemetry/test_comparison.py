import math

import pytest

from hybridopt.telemetry.comparison import reach, settle
from tests.telemetry.builders import arm, comparison, curve


def test_reach_interpolates_between_the_two_evaluations_around_the_loss():
    points = curve((3.0, 2.0, 1.0), cost_per_point=10, wall_per_point=4)
    found = reach(points, 1.75)
    assert found is not None
    assert found.cost == pytest.approx(12.5)
    assert found.wall_s == pytest.approx(5.0)
    assert found.step == pytest.approx(12.5)
    assert found.loss == 1.75


def test_reach_takes_the_first_crossing_of_a_curve_that_rises_again():
    points = curve((3.0, 2.0, 2.8, 1.0), cost_per_point=10)
    assert reach(points, 2.5).cost == pytest.approx(5.0)


@pytest.mark.parametrize("loss", [0.999, -1.0, math.nan, -math.inf])
def test_reach_never_extrapolates(loss):
    assert reach(curve((3.0, 2.0, 1.0), 10), loss) is None


def test_reach_returns_the_point_itself_where_the_loss_was_measured():
    assert reach(curve((3.0, 2.0), 10), 2.0).cost == pytest.approx(10.0)


def test_reach_does_not_interpolate_from_a_loss_that_is_not_finite():
    assert reach(curve((math.nan, 2.0), 10), 2.5).cost == 10.0


def test_settle_ignores_a_dip_that_did_not_last():
    points = curve((3.0, 2.0, 2.8, 2.4, 1.0), cost_per_point=10)
    assert settle(points, 2.5).cost == pytest.approx(27.5)
    assert settle(points, 0.9) is None
    assert settle(curve((3.0, 2.0, 2.8), 10), 2.5) is None
    assert settle(curve((3.0, 2.0), 10), math.nan) is None
    assert settle((), 2.5) is None


def test_equal_loss_gives_the_hybrid_no_credit_for_a_dip():
    equal = comparison((3.0, 2.1, 2.6, 2.4), hybrid_cost=10).equal_loss()
    assert equal.loss == 2.4
    assert equal.hybrid.cost == 30.0
    assert equal.bare.cost == pytest.approx(13.333, abs=1e-3)
    assert equal.cost_speedup < 1


def test_equal_loss_is_the_lowest_that_both_runs_reached():
    faster = comparison().equal_loss()
    assert faster.loss == 2.0
    assert faster.bare.cost == 30.0
    assert faster.hybrid.cost == 10.0
    assert faster.cost_speedup == pytest.approx(3.0)
    worse = comparison(hybrid_losses=(3.0, 2.8, 2.6, 2.5), hybrid_cost=10).equal_loss()
    assert worse.loss == 2.5
    assert worse.cost_speedup == pytest.approx(10 / 30)


def test_equal_loss_is_none_when_a_run_never_got_below_its_start():
    assert comparison(hybrid_losses=(3.0, 3.1, 3.2)).equal_loss() is None
    assert comparison(hybrid_losses=(3.0, math.nan)).equal_loss() is None


def test_cost_counts_forwards_a_third_and_backwards_two_thirds():
    run = arm("x", (3.0, 2.0), forward_calls=9, backward_calls=6)
    assert run.cost == pytest.approx(9 / 3 + 6 * 2 / 3)


def test_bookkeeping_share_is_of_wall_time_and_none_for_bare_runs():
    runs = comparison()
    assert runs.bare.bookkeeping_share is None
    assert runs.hybrid.bookkeeping_share == pytest.approx(30 * 1e-4 / 3.0)
