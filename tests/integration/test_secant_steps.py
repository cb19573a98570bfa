"""Real steps around secant moves: what they leave out, and how they end."""

import copy

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import Prior
from hybridopt.errors import RecoveryAction
from hybridopt.types import Mover
from hybridopt.weights.flat import flatten
from hybridopt.weights.space import WeightSpace
from tests.problems import BASES, assert_same_bits, regression, train


def _moving(steps=60, **overrides):
    """A run in the midst of secant moves."""
    problem = regression(batches=1, noise=0.0)
    base = BASES["adam"](list(problem.model.parameters()))
    opt = HybridPredictOptimizer(
        base,
        model=problem.model,
        **{"predictor": Prior(), "warmup_steps": 6, **overrides},
    )
    train(problem, opt, steps)
    assert opt.last_step.mover is Mover.SECANT
    assert opt.run.space.held
    return problem, opt


def _hear_noise(opt):
    """Let the loss look noisy beyond doubt."""
    for _ in range(20):
        opt.run.noise.add(0.0, 1.0, -1e-3, -1e-3)
    assert opt.run.noise.is_high


def _observed(opt, monkeypatch):
    """Observations of the steps from here on."""
    seen = []
    judge = opt.run.monitor.judge

    def listen(observation, **more):
        seen.append(observation)
        return judge(observation, **more)

    monkeypatch.setattr(opt.run.monitor, "judge", listen)
    return seen


@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_secant_step_leaves_the_base_weights_as_its_anchor(memory, monkeypatch):
    problem, opt = _moving(memory=memory)
    behind = []
    hold = WeightSpace.hold

    def listen(space):
        behind.append(problem.weights())
        hold(space)

    monkeypatch.setattr(WeightSpace, "hold", listen)
    train(problem, opt, 1, start=60)
    assert opt.last_step.mover is Mover.SECANT
    moved = problem.weights()
    assert not all(map(torch.equal, moved, behind[0]))
    opt.run.space.roll_back()
    assert_same_bits(behind[0], problem.weights())


def test_a_secant_step_leads_to_x_plus_direction_exactly():
    problem, opt = _moving()
    state = opt.run.secant.state_dict()
    expected = state["position"] + state["direction"]
    assert torch.equal(flatten(problem.weights()), expected)


def test_weights_go_back_bit_for_bit_after_too_many_rejections(monkeypatch):
    problem, opt = _moving()
    anchors = [
        opt.state[p]["hybrid_anchor"].clone() for p in problem.model.parameters()
    ]
    monkeypatch.setattr(opt.run.secant, "judge", _reject(opt.run.secant))
    for step in range(60, 64):
        train(problem, opt, 1, start=step)
        assert opt.last_step.action is RecoveryAction.ROLL_BACK
    assert not opt.run.secant.pending
    assert_same_bits(problem.weights(), anchors)


def _reject(mover):
    judge = type(mover).judge
    return lambda loss: judge(mover, float("inf"))


def test_averaged_weights_come_along_with_secant_moves():
    problem, opt = _moving()
    weights = problem.weights()
    with opt.evaluation_weights():
        assert_same_bits(problem.weights(), weights)


def test_secant_steps_measure_no_more_than_the_norm(monkeypatch):
    problem, opt = _moving()
    seen = _observed(opt, monkeypatch)
    train(problem, opt, 5, start=60)
    for observation in seen:
        assert observation.partial
        assert observation.gradient_norm > 0.0
        assert not observation.dots.any()


def test_a_whole_step_comes_between_secant_moves_and_gain_moves(monkeypatch):
    problem, opt = _moving()
    _hear_noise(opt)
    seen = _observed(opt, monkeypatch)
    train(problem, opt, 1, start=60)
    assert opt.last_step.mover is Mover.NONE
    assert opt.run.secant_off
    assert opt.run.controller.move is None
    assert not opt.run.space.held
    before = opt.run.counters.folded_moves
    train(problem, opt, 40, start=61)
    assert not seen[1].partial
    assert bool(seen[1].slopes.any())
    assert bool(seen[1].basis_sq.any())
    assert opt.run.counters.folded_moves + opt.run.counters.predicted_steps > before


def test_weight_decay_ends_secant_moves_with_a_whole_step():
    problem, opt = _moving()
    opt.param_groups[0]["weight_decay"] = 0.01
    train(problem, opt, 1, start=60)
    assert opt.last_step.mover is Mover.NONE
    assert opt.run.space.stepped
    assert not opt.run.secant.pending


@pytest.mark.parametrize("noisy", [False, True])
def test_resume_amid_secant_moves_equals_uninterrupted(noisy):
    problem, opt = _moving()
    if noisy:
        _hear_noise(opt)
    twin = problem.twin()
    twin.model.load_state_dict(copy.deepcopy(problem.model.state_dict()))
    other = HybridPredictOptimizer(
        BASES["adam"](list(twin.model.parameters())),
        model=twin.model,
        predictor=Prior(),
        warmup_steps=6,
    )
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.run.space.held
    assert train(problem, opt, 60, start=60) == train(twin, other, 60, start=60)
    assert_same_bits(problem.weights(), twin.weights())
