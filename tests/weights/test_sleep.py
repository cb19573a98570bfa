"""Asleep, weight space keeps only the EMA going; nothing that is decided may change."""

import copy

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import GainConfig, Prior, SecantConfig
from hybridopt.control.controller import WAKING_STEPS
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.types import Extent
from hybridopt.weights import WeightSpace
from hybridopt.weights.buckets import Bucket
from hybridopt.weights.lag import _take_on_device, _take_on_host
from tests.problems import assert_same_bits, regression, train

OFF = SecantConfig(enabled=False)
SLOW = GainConfig(maximum=16.0, boost=0.0, eager=0.0)
"""Gains that leave time for moves that consume no steps."""


def _build(problem, **overrides):
    base = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    return HybridPredictOptimizer(
        base,
        **{
            "predictor": Prior(),
            "secant": OFF,
            "gain": SLOW,
            "warmup_steps": 5,
            **overrides,
        },
    )


def _fall_asleep(problem, opt, start=0, steps=40):
    train(problem, opt, 30, start=start)
    opt.run.controller.sleep_steps = steps


def _runs(monkeypatch, measure, **overrides):
    """What ``measure`` finds with sleeping steps, and with whole ones instead."""
    found = []
    for whole in (False, True):
        problem = regression()
        opt = _build(problem, **overrides)
        if whole:
            monkeypatch.setattr(WeightSpace, "can_doze", False)
        _fall_asleep(problem, opt)
        found.append(measure(problem, opt))
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("memory", ["default", "low"])
def test_weights_and_plans_are_those_of_whole_steps(memory, monkeypatch):
    def measure(problem, opt):
        losses = train(problem, opt, 37, start=30)
        dozed = opt.run.space.state_dict()["dozed"]
        # Less than a drift window: its direction holds the lag, which differs a little.
        losses += train(problem, opt, 30, start=67)
        moves = opt.statistics()["folded_moves"]
        return dozed, moves, losses, problem.weights()

    asleep, whole = _runs(monkeypatch, measure, memory=memory)
    assert (asleep[0] > 0, whole[0]) == (True, 0)
    assert asleep[1] > 10
    assert asleep[1:3] == whole[1:3]
    assert_same_bits(asleep[3], whole[3])


@pytest.mark.parametrize("steps", [1, 5, 9, 24])
def test_evaluation_weights_in_sleep_are_close_to_the_ema(steps, monkeypatch):
    def measure(problem, opt):
        train(problem, opt, steps, start=30)
        before = problem.weights()
        with opt.evaluation_weights():
            inside = torch.cat([w.flatten() for w in problem.weights()])
        assert_same_bits(before, problem.weights())
        return inside, torch.cat([w.flatten() for w in before])

    (asleep, now), (whole, same) = _runs(monkeypatch, measure)
    assert torch.equal(now, same)
    assert (asleep - whole).norm() < 0.03 * (whole - now).norm()


def test_looking_at_evaluation_weights_changes_nothing():
    runs = []
    for looks in (False, True):
        problem = regression()
        opt = _build(problem)
        _fall_asleep(problem, opt)
        for step in range(30, 110):
            train(problem, opt, 1, start=step)
            if looks:
                with opt.evaluation_weights():
                    pass
        runs.append(problem.weights())
    assert_same_bits(*runs)


@pytest.mark.parametrize("steps", range(1, 12))
def test_resume_in_sleep_equals_uninterrupted(steps):
    problem = regression()
    opt = _build(problem)
    _fall_asleep(problem, opt, steps=steps + WAKING_STEPS + 5)
    train(problem, opt, steps, start=30)
    twin = problem.twin()
    other = _build(twin)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.run.controller.extent in (Extent.NORM, Extent.GLANCE)
    start = 30 + steps
    assert train(problem, opt, 90, start=start) == train(twin, other, 90, start=start)
    assert_same_bits(problem.weights(), twin.weights())
    for p, q in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(opt.state[p]["hybrid_lag"], other.state[q]["hybrid_lag"])


def test_a_bad_step_in_sleep_is_skipped():
    problem = regression()
    opt = _build(problem)
    _fall_asleep(problem, opt)
    train(problem, opt, 5, start=30)
    before = problem.weights()
    opt.step(lambda: problem.loss(35) * float("nan"))
    assert_same_bits(before, problem.weights())
    assert opt.statistics()["skipped_steps"] == 1
    train(problem, opt, 60, start=36)
    assert all(bool(w.isfinite().all()) for w in problem.weights())


def test_a_parameter_that_gets_its_first_gradient_in_sleep_joins_in():
    problem = regression()
    late = torch.nn.Parameter(torch.zeros(3))
    base = torch.optim.AdamW([*problem.model.parameters(), late], lr=1e-3)
    opt = HybridPredictOptimizer(
        base, predictor=Prior(), secant=OFF, warmup_steps=5, max_predict_steps=0
    )
    _fall_asleep(problem, opt)
    for i in range(30, 110):
        opt.step(lambda i=i: problem.loss(i) + (late - 1).square().sum())
    assert not opt.run.controller.asleep
    assert 0.0 < float(opt.state[late]["hybrid_step"].abs().sum()) < 1.0
    assert bool(late.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_taking_slept_steps_in_agree(dtype):
    generator = torch.Generator().manual_seed(0)
    theta, anchor, lag = (torch.randn(50, generator=generator) for _ in range(3))
    found = []
    for take in (_take_on_host, _take_on_device):
        bucket = Bucket(
            tracked=True,
            parameters=[theta.clone()],
            anchors=[anchor.clone()],
            steps=[torch.zeros(50, dtype=dtype)],
            lags=[lag.to(dtype, copy=True)],
        )
        take(bucket, TorchOps(), 0.78, 0.87)
        assert_same_bits(bucket.anchors, [theta])
        found.append((bucket.steps[0].float(), bucket.lags[0].float()))
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-6
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    expected = 0.78 * lag + 0.87 * (theta - anchor)
    torch.testing.assert_close(found[1][1], expected, rtol=tolerance, atol=tolerance)
