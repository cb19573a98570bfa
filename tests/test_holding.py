"""Rates that a schedule takes away are held in part, where drift moves pay."""

import copy

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import DriftConfig, GainConfig, Prior, SecantConfig
from hybridopt.holding import LARGEST_FACTOR, RateHold
from hybridopt.types import Mover
from tests.problems import assert_same_bits, regression, train

IDLE = GainConfig(rate=0.0, initial=0.0, minimum=0.0)


def groups(*rates):
    return [{"lr": rate} for rate in rates]


def test_factor_is_the_share_of_the_decay_that_the_exponent_says():
    hold = RateHold()
    assert hold.factors(groups(0.4, 1.0), 0.5) == [1.0, 1.0]
    assert hold.factors(groups(0.1, 1.0), 0.5) == pytest.approx([2.0, 1.0])
    assert hold.factor == pytest.approx(2.0)
    assert hold.factors(groups(0.1, 1.0), 0.0) == [1.0, 1.0]
    # A rate that comes back, or a new peak, is the user's own again.
    assert hold.factors(groups(0.4, 3.0), 0.5) == [1.0, 1.0]
    assert hold.factors(groups(0.4, 0.75), 0.5) == pytest.approx([1.0, 2.0])


def test_schedule_that_goes_to_zero_may_stop_there():
    hold = RateHold()
    hold.factors(groups(1.0), 1.0)
    assert hold.factors(groups(1e-9), 1.0) == [LARGEST_FACTOR]
    assert hold.factors(groups(0.0), 1.0) == [1.0]


def test_new_group_has_no_past():
    hold = RateHold()
    hold.factors(groups(1.0), 1.0)
    assert hold.factors(groups(0.5, 0.1), 1.0) == [2.0, 1.0]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rates_are_the_users_again_behind_the_step(as_tensor):
    rate = torch.tensor(0.3) if as_tensor else 0.3
    some = groups(rate)
    hold = RateHold()
    hold.factors(groups(1.0), 1.0)
    with hold.held(some, 1.0):
        assert float(some[0]["lr"]) == pytest.approx(1.0)
        assert (some[0]["lr"] is rate) is as_tensor
    assert some[0]["lr"] is rate
    assert float(rate) == float(torch.tensor(0.3) if as_tensor else 0.3)
    with pytest.raises(RuntimeError, match="base"), hold.held(some, 1.0):
        raise RuntimeError("the base failed")
    assert some[0]["lr"] is rate


def test_rate_that_the_base_changed_itself_stays():
    some = groups(0.5)
    hold = RateHold()
    hold.factors(groups(1.0), 1.0)
    with hold.held(some, 1.0):
        some[0]["lr"] = 0.2
    assert some[0]["lr"] == 0.2


def _optimizer(problem, hold, decay=0.01, **overrides):
    settings = {
        "predictor": Prior(),
        "secant": SecantConfig(enabled=False),
        "gain": IDLE,
        # Gains at their floor are high, so something is held once one was measured.
        "drift": DriftConfig(window_steps=6, minimum=0.3, rate=0.0, hold=hold),
        "warmup_steps": 5,
        **overrides,
    }
    base = torch.optim.AdamW(problem.model.parameters(), lr=1e-2, weight_decay=decay)
    return HybridPredictOptimizer(base, **settings)


def _decay(opt, step):
    for group in opt.param_groups:
        group["lr"] = 1e-2 * 0.9**step


def test_held_step_is_the_bases_own_at_the_longer_rate():
    problem = regression()
    opt = _optimizer(problem, hold=2.0)
    factors, checked = [], 0
    for step in range(40):
        _decay(opt, step)
        twin_problem = problem.twin()
        before = copy.deepcopy(opt.base.state_dict())
        moves = opt.statistics()["folded_moves"]
        train(problem, opt, 1, start=step)
        statistics = opt.statistics()
        factors.append(statistics["held_rate"])
        assert opt.param_groups[0]["lr"] == 1e-2 * 0.9**step
        if statistics["folded_moves"] > moves or factors[-1] == 1.0:
            continue
        base = torch.optim.AdamW(twin_problem.model.parameters(), lr=1.0)
        base.load_state_dict(before)
        for group in base.param_groups:
            group["lr"] = 1e-2 * 0.9**step * factors[-1]
        twin_problem.loss(step).backward()
        base.step()
        assert_same_bits(problem.weights(), twin_problem.weights())
        checked += 1
    assert factors[0] == 1.0 < factors[-1]
    # Gains of 0.3 would hold 0.4; where steps have spoken for the drift, 0.5 is least.
    assert opt.run.predictor.window.persistence.proven
    assert factors[-1] == pytest.approx(0.9 ** (-0.5 * 39), rel=1e-9)
    assert checked >= 5


def test_without_hold_or_without_decay_nothing_is_held():
    for hold, decays in ((0.0, True), (2.0, False)):
        problem = regression()
        opt = _optimizer(problem, hold=hold)
        for step in range(40):
            if decays:
                _decay(opt, step)
            train(problem, opt, 1, start=step)
            assert opt.statistics()["held_rate"] == 1.0


def test_secant_moves_undo_the_step_so_nothing_of_it_is_held():
    problem = regression(batches=1, noise=0.0)
    opt = _optimizer(problem, hold=2.0, decay=0.0, secant=SecantConfig())
    train(problem, opt, 60)
    assert opt.last_step.mover is Mover.SECANT
    opt.run.controller.hold = 0.5
    for _ in range(3):
        _decay(opt, 20)
        train(problem, opt, 1)
        assert opt.last_step.mover is Mover.SECANT
        assert opt.statistics()["held_rate"] == 1.0


def test_resume_goes_on_holding(tmp_path):
    problem = regression()
    opt = _optimizer(problem, hold=2.0)
    for step in range(25):
        _decay(opt, step)
        train(problem, opt, 1, start=step)
    path = tmp_path / "state.pt"
    torch.save(opt.state_dict(), path)
    other = problem.twin()
    resumed = _optimizer(other, hold=2.0)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    assert resumed.statistics()["held_rate"] == opt.statistics()["held_rate"] > 1.0
    for step in range(25, 50):
        for each, mine in ((problem, opt), (other, resumed)):
            _decay(mine, step)
            train(each, mine, 1, start=step)
        assert resumed.statistics()["held_rate"] == opt.statistics()["held_rate"]
        assert_same_bits(problem.weights(), other.weights())
