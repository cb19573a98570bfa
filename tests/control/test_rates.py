"""What the host knows of learning rates: one per parameter, and the largest."""

import math

import pytest
import torch

from hybridopt import HybridPredictOptimizer


def _run(rates, frozen=()):
    groups = [
        {
            "params": [
                torch.nn.Parameter(torch.zeros(2), requires_grad=i not in frozen)
                for _ in range(2)
            ],
            "lr": rate,
        }
        for i, rate in enumerate(rates)
    ]
    return HybridPredictOptimizer(torch.optim.SGD(groups, lr=0.1)).run


@pytest.mark.parametrize(
    ("rates", "frozen", "top"),
    [
        ([0.1], (), 0.1),
        ([0.1, 0.3, 0.2], (), 0.3),
        ([0.1, 0.3, 0.2], (1,), 0.2),
        ([0.0, torch.tensor(0.5)], (), 0.5),
    ],
)
def test_top_rate_is_the_largest_of_those_in_use(rates, frozen, top):
    run = _run(rates, frozen)
    assert run.top_rate() == top
    assert run.top_rate() == float(run.rates().max())
    assert len(run.rates()) == 2 * (len(rates) - len(frozen))


@pytest.mark.parametrize("place", range(3))
def test_one_rate_that_is_no_number_makes_the_largest_one_none(place):
    run = _run([0.1, 0.3, 0.2])
    run.base.param_groups[place]["lr"] = math.nan
    assert math.isnan(run.top_rate())


def test_no_trainable_parameter_has_no_rate():
    run = _run([0.1])
    for p in run.base.param_groups[0]["params"]:
        p.requires_grad_(False)
    run.space.refresh()
    assert run.top_rate() == 0.0
    assert len(run.rates()) == 0


def test_rates_follow_a_scheduler():
    run = _run([0.1, 0.2])
    before = run.rates()
    assert run.rates() is before
    run.base.param_groups[1]["lr"] = 0.05
    assert run.rates().tolist() == [0.1, 0.1, 0.05, 0.05]
    assert run.top_rate() == 0.1
