"""Steps only glanced at: nothing bad passes, and what was left out is known."""

import math

import pytest
import torch

from hybridopt.config import DriftConfig
from hybridopt.control.controller import DEEP_GLANCES
from hybridopt.dynamics.window import WindowGains
from hybridopt.types import Extent
from tests.problems import assert_same_bits, regression, spoiled, train
from tests.weights.test_coasting import K, coasting, train_until


def _glance(problem, opt):
    return train_until(problem, opt, Extent.GLANCE)


@pytest.fixture
def glancing():
    problem = regression()
    opt = coasting(problem)
    return problem, opt, _glance(problem, opt)


def test_a_glance_measures_neither_drift_nor_verdict(glancing, monkeypatch):
    problem, opt, step = glancing
    for name in ("judge", "absorb"):
        monkeypatch.setattr(type(opt.run.monitor), name, None)
    monkeypatch.setattr(type(opt.run.space), "observe", None)
    windows = opt.run.predictor.window
    before, sums = windows.count, windows._gradients.copy()
    train(problem, opt, 1, start=step)
    assert windows.count == before + 1
    assert (windows._gradients == sums).all()


def test_the_record_of_a_glance_tells_loss_and_gradient_norm(glancing):
    problem, opt, step = glancing
    loss = problem.loss(step)
    found = torch.autograd.grad(loss, list(problem.model.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in found))
    real = opt.statistics()["real_steps"]
    train(problem, opt, 1, start=step)
    assert opt.last_step.loss == pytest.approx(float(loss.detach()))
    assert opt.last_step.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert opt.statistics()["real_steps"] == real + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_passes_as_a_glance(glancing, bad, where):
    problem, opt, step = glancing
    before = problem.weights()

    opt.step(spoiled(problem, opt, step, where, bad))
    assert_same_bits(before, problem.weights())
    assert opt.statistics()["skipped_steps"] == 1
    assert opt.run.controller.extent is Extent.GLANCE


def test_a_rate_that_is_no_number_never_passes_as_a_glance(glancing):
    problem, opt, step = glancing
    before = problem.weights()
    opt.param_groups[0]["lr"] = math.nan
    opt.step(lambda: problem.loss(step))
    assert_same_bits(before, problem.weights())


def test_where_ranks_must_agree_nobody_glances(glancing, monkeypatch):
    problem, opt, step = glancing
    seen = []
    observe = type(opt.run.space).observe

    def watched(self, loss, extent=Extent.WHOLE):
        seen.append(extent)
        return observe(self, loss, extent)

    monkeypatch.setattr(type(opt.run.collective), "world_size", 2, raising=False)
    monkeypatch.setattr(type(opt.run.space), "observe", watched)
    opt.step(lambda: problem.loss(step))
    assert seen == [Extent.NORM]


def test_asleep_one_step_in_eight_is_judged():
    problem = regression()
    opt = coasting(problem, drift=DriftConfig(enabled=False))
    train(problem, opt, 30)
    opt.run.controller.sleep_steps, opt.run.controller.coasting = 200, False
    train(problem, opt, 1, start=30)  # measures the move behind the step before
    before = opt.run.monitor.state_dict()["absorbed"]
    train(problem, opt, 5 * DEEP_GLANCES, start=31)
    assert opt.run.monitor.state_dict()["absorbed"] == before + 5


def test_moves_are_still_made_as_windows_turn(glancing):
    problem, opt, step = glancing
    moves = opt.statistics()["folded_moves"]
    turned = opt.run.predictor.window.windows
    coasted = 0
    for i in range(step, step + 4 * K):
        coasted += opt.run.controller.asleep
        train(problem, opt, 1, start=i)
    assert coasted > K
    assert opt.run.predictor.window.windows >= turned + 3
    assert opt.statistics()["folded_moves"] >= moves + 3


def test_a_measured_step_stands_for_those_glanced_at_before_it():
    problem = regression()
    opt = coasting(problem)
    step = _glance(problem, opt)
    windows: WindowGains = opt.run.predictor.window
    windows.count = 0
    windows._forget_sums()
    norms, left_out = 0.0, 0
    for i in range(step, step + 6):
        extent = opt.run.controller.extent
        train(problem, opt, 1, start=i)
        left_out += 1
        if extent is not Extent.GLANCE:
            # It stands for those before it.
            norms += left_out * opt.last_step.gradient_norm**2
            left_out = 0
    assert norms > 0.0
    assert float(windows._gradients.sum()) == pytest.approx(norms, rel=1e-5)
