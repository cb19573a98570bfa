"""The lead follows what the gradients behind the base's steps say."""

import math

import pytest
import torch

from hybridopt.config import LeadConfig
from hybridopt.dynamics.lead import LeadLength


def _statistics(fresh, along):
    """(2, 4) whose cosines are c = ``fresh`` and r = ``along``, in units of norms 1."""
    row = [0.5, along / 2, (along - fresh) / 2, 0.5]
    return torch.tensor([row, row], dtype=torch.float64)


def _after(measurements, **config):
    length = LeadLength(LeadConfig(**config))
    for fresh, along in measurements:
        length.learn(_statistics(fresh, along))
    return length


def test_lead_grows_where_the_newest_part_of_overshooting_steps_pays():
    length = _after([(0.1, -0.05)] * 6, rate=0.1)
    assert length.value == pytest.approx(0.5)  # five times its full rate


@pytest.mark.parametrize("along", [0.0, 0.05, 0.3])
def test_no_lead_where_steps_do_not_overshoot(along):
    assert _after([(0.1, along)] * 30).value == 0.0


def test_lead_shrinks_where_it_has_gone_too_far_and_never_below_zero():
    length = _after([(0.1, -0.05)] * 20, rate=0.1)
    grown = length.value
    for _ in range(12):
        length.learn(_statistics(-0.2, -0.05))
    assert 0.0 < length.value < grown
    for _ in range(60):
        length.learn(_statistics(-0.2, -0.05))
    assert length.value == 0.0


def test_lead_relaxes_without_evidence():
    length = _after([(0.1, -0.05)] * 20, rate=0.1, relaxation=0.1)
    values = []
    for i in range(40):
        length.learn(_statistics(0.1 * (-1) ** i, -0.05))
        values.append(length.value)
    assert values[-1] < 0.1 * max(values)


def test_lead_stays_within_its_maximum():
    assert _after([(0.1, -0.05)] * 100, maximum=1.5).value == 1.5
    assert _after([(0.1, -0.05)] * 100, maximum=0.0).value == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", range(4))
def test_what_is_not_finite_is_not_learned_from(bad, column):
    length = _after([(0.1, -0.05)] * 6)
    before = length.state_dict()
    statistics = _statistics(-0.3, 0.1)
    statistics[0, column] = bad
    length.learn(statistics)
    assert length.state_dict() == before


def test_nothing_is_learned_from_a_step_that_did_not_happen():
    length = _after([(0.1, -0.05)] * 6)
    before = length.state_dict()
    length.learn(torch.zeros(2, 4, dtype=torch.float64))
    length.learn(torch.zeros(0, 4, dtype=torch.float64))
    assert length.state_dict() == before


def test_state_goes_on_where_it_was():
    length = _after([(0.1, -0.05)] * 9)
    other = LeadLength(LeadConfig())
    other.load_state_dict(length.state_dict())
    for each in (length, other):
        each.learn(_statistics(0.02, -0.03))
    assert length.state_dict() == other.state_dict()
