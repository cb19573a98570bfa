"""Input that nobody should give: a clear error or a skipped step, and nothing lost."""

import copy
import math

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import FixedHorizon, Prior
from hybridopt.errors import (
    CheckpointError,
    ClosureError,
    ConfigError,
    RecoveryAction,
)
from hybridopt.run import Components
from tests.parts import FixedPredictor
from tests.problems import BASES, assert_same_bits, regression, train


def _build(problem, name="adamw_slow", **overrides):
    base = BASES[name](list(problem.model.parameters()))
    return HybridPredictOptimizer(
        base, **{"predictor": Prior(), "warmup_steps": 5, **overrides}
    )


def test_configuration_as_a_dict_is_told_how_to_become_one():
    base = torch.optim.SGD(regression().model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="from_dict"):
        HybridPredictOptimizer(base, {"warmup_steps": 3})


@pytest.mark.parametrize("enabled", [True, False])
def test_closure_that_cannot_be_called_changes_nothing(enabled):
    problem = regression()
    opt = _build(problem, enabled=enabled)
    before = problem.weights()
    with pytest.raises(ClosureError, match="callable"):
        opt.step(3)
    assert_same_bits(before, problem.weights())


@pytest.mark.parametrize("state", [{}, None, [], {"model": 1, "optimizer": 2}])
def test_what_is_no_state_dict_is_refused_and_changes_nothing(state):
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 20)
    before, weights = copy.deepcopy(opt.state_dict()), problem.weights()
    with pytest.raises(CheckpointError, match="param_groups"):
        opt.load_state_dict(state)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert_same_bits(weights, problem.weights())


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_learning_rate_that_is_no_number_never_reaches_the_weights(rate):
    problem = regression()
    opt = _build(problem)
    good = opt.param_groups[0]["lr"]
    skipped = 0
    for step in range(80):
        opt.param_groups[0]["lr"] = rate if step % 9 == 8 else good
        opt.step(lambda step=step: problem.loss(step))
        skipped += opt.last_step.action is not RecoveryAction.CONTINUE
        assert all(bool(w.isfinite().all()) for w in problem.weights())
    assert skipped >= 3


def test_secant_moves_leave_problems_with_weight_decay_alone():
    # The wrapped run must end where the decayed objective is lowest, as the base does.
    problem = regression(batches=1, noise=0.0)
    base = torch.optim.AdamW(problem.model.parameters(), lr=3e-3, weight_decay=0.1)
    opt = HybridPredictOptimizer(base, predictor=Prior())
    train(problem, opt, 60)
    assert opt.statistics()["secant_moves"] == 0
    opt.param_groups[0]["weight_decay"] = 0.0
    train(problem, opt, 60, start=60)
    assert opt.statistics()["secant_moves"] > 0


def test_closure_that_runs_backward_where_others_did_not_is_told_so_in_validation():
    problem = regression()
    base = BASES["adamw_slow"](list(problem.model.parameters()))
    opt = HybridPredictOptimizer(
        base,
        model=problem.model,
        components=Components(predictor=FixedPredictor(0.5, 50.0)),
        warmup_steps=5,
        max_predict_steps=2,
        bandit=FixedHorizon(),
        validation_interval=1,
    )
    step = 0
    while not opt.run.controller.plan.validates:
        train(problem, opt, 1, start=step)
        step += 1
        assert step < 50
    before, state = problem.weights(), copy.deepcopy(opt.state_dict())

    def classic():
        opt.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        return loss

    with pytest.raises(ClosureError, match="validation_interval=0"):
        opt.step(classic)
    assert_same_bits(before, problem.weights())
    twin = problem.twin()
    other = HybridPredictOptimizer(
        BASES["adamw_slow"](list(twin.model.parameters())),
        opt.config,
        model=twin.model,
        components=Components(predictor=FixedPredictor(0.5, 50.0)),
    )
    other.load_state_dict(state)
    assert train(problem, opt, 20, start=step) == train(twin, other, 20, start=step)
    assert_same_bits(problem.weights(), twin.weights())
