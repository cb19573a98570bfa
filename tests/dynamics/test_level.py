"""Ranks tell whether the loss has risen above its lowest window."""

import math
import random
from statistics import NormalDist

import pytest

from hybridopt.dynamics.level import FEWEST, MOST, LossLevel


def _after(*windows):
    level = LossLevel()
    for window in windows:
        for loss in window:
            level.add(loss)
        level.close()
    return level


def _noisy(middle, seed, count=40):
    source = random.Random(seed)
    return [source.gauss(middle, 0.1) for _ in range(count)]


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.05, 0.07, 0.2])
@pytest.mark.parametrize("sizes", [(40, 40), (10, 25)])
def test_calm_follows_its_literal_twin(shift, sizes):
    old = [round(x, 2) for x in _noisy(1.0, 1, sizes[0])]  # rounded: ties
    new = [round(x, 2) for x in _noisy(1.0 + shift, 2, sizes[1])]
    n, m = len(new), len(old)
    pairs = sum((a > b) + 0.5 * (a == b) for a in new for b in old)
    z = (pairs - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    assert _after(old, new).calm == pytest.approx(min(max((3 - z) / 2, 0), 1))


def test_by_chance_alone_the_loss_seldom_counts_as_risen():
    risen = [
        _after(_noisy(1.0, 2 * i), _noisy(1.0, 2 * i + 1)).calm for i in range(400)
    ]
    share = sum(c < 1.0 for c in risen) / len(risen)
    # One standard error above the mean, or further: 16 % of a normal distribution.
    assert share == pytest.approx(1.0 - NormalDist().cdf(1.0), abs=0.05)
    assert sum(c == 0.0 for c in risen) <= 2


def test_a_loss_that_falls_is_calm_and_one_that_rises_is_not_until_it_is_back():
    falling = [_noisy(1.0 - 0.1 * i, i) for i in range(4)]
    assert _after(*falling).calm == 1.0
    risen = _after(*falling, _noisy(0.9, 7))
    assert risen.calm == 0.0
    # Compared with the lowest window, not with the last.
    assert _after(*falling, _noisy(0.9, 7), _noisy(0.85, 8)).calm == 0.0
    assert _after(*falling, _noisy(0.9, 7), _noisy(0.6, 8)).calm == 1.0


def test_jumps_of_single_losses_neither_hide_a_rise_nor_make_one():
    lowest = _noisy(1.0, 1)
    jumping = [100.0, 100.0, *_noisy(1.0, 2)[2:]]
    assert _after(lowest, jumping).calm == _after(lowest, _noisy(1.0, 2)).calm == 1.0
    assert _after(lowest, [100.0, 300.0, *_noisy(1.2, 2)[2:]]).calm == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_ignored(bad):
    lowest, newest = _noisy(1.0, 1), _noisy(1.05, 2)
    spoilt = [bad, *newest[:20], bad, *newest[20:]]
    assert _after(lowest, spoilt).calm == _after(lowest, newest).calm


def test_too_few_losses_wait_for_the_next_window():
    few = [2.0] * (FEWEST - 1)
    level = _after([1.0] * FEWEST, few)
    assert level.calm == 1.0
    level.add(2.0)
    level.close()
    assert level.calm == 0.0


def test_a_window_without_end_keeps_only_its_newest_losses():
    endless = [9.0] * 10_000 + [1.0] * MOST
    level = _after(_noisy(2.0, 1), endless)
    assert level.calm == 1.0  # those at 9 are forgotten
    for loss in [5.0] * 10_000:
        level.add(loss)
    assert len(level.state_dict()["newest"]["values"]) == MOST


def test_state_goes_on_where_it_was():
    level = _after(_noisy(1.0, 1), _noisy(1.06, 2))
    for loss in _noisy(1.02, 3)[:11]:
        level.add(loss)
    other = LossLevel()
    other.load_state_dict(level.state_dict())
    assert other.calm == level.calm
    for one in (level, other):
        one.add(1.3)
        one.close()
    assert other.calm == level.calm < 1.0
    assert other.state_dict() == level.state_dict()
