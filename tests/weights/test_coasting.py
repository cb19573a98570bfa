"""Coasting, only the drift is measured; all else is as in whole steps."""

import copy

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import DriftConfig, GainConfig, Prior, SecantConfig
from hybridopt.types import DRIFT, STEP, Extent
from hybridopt.weights import WeightSpace
from tests.problems import assert_same_bits, regression, train

K = 12
IDLE = GainConfig(rate=0.0, initial=0.0, minimum=0.0)


def coasting(problem, *more, **overrides):
    """An optimizer whose one-step moves are worth nothing and whose drift moves are."""
    parameters = [*problem.model.parameters(), *more]
    settings = {
        "predictor": Prior(),
        "secant": SecantConfig(enabled=False),
        "gain": IDLE,
        "drift": DriftConfig(window_steps=K, minimum=0.3),
        "warmup_steps": 5,
        **overrides,
    }
    base = torch.optim.AdamW(parameters, lr=1e-3)
    return HybridPredictOptimizer(base, **settings)


def train_until(problem, opt, extent, limit=120):
    """Train up to a step that is measured so far; the number of steps made."""
    for step in range(limit):
        if opt.run.controller.extent is extent and opt.run.space.can_doze:
            return step
        train(problem, opt, 1, start=step)
    raise AssertionError(f"never at {extent}")


def _coast(problem, opt):
    return train_until(problem, opt, Extent.DRIFT)


def test_drift_that_pays_makes_it_coast_and_windows_go_on():
    problem = regression()
    opt = coasting(problem)
    start = _coast(problem, opt)
    windows = opt.run.predictor.window.windows
    seen = []
    for step in range(start, start + 4 * K):
        seen.append(opt.run.controller.extent)
        train(problem, opt, 1, start=step)
    assert opt.run.predictor.window.windows == windows + 4
    assert seen.count(Extent.DRIFT) + seen.count(Extent.GLANCE) > 2 * K
    # One a window: plans are made at the very step, not one step late as on a GPU.
    assert 1 <= seen.count(Extent.TURN) <= 4
    assert Extent.WHOLE in seen  # behind the moves


def test_coasting_windows_hold_the_drift_of_whole_steps(monkeypatch):
    found = []
    for whole in (False, True):
        problem = regression()
        opt = coasting(problem)
        start = _coast(problem, opt)
        if whole:
            monkeypatch.setattr(WeightSpace, "can_doze", False)
        turns, turn = [], opt.run.space.turn_window

        def watched(turns=turns, turn=turn, opt=opt):
            turns.append([d.clone() for b in opt.run.space._all() for d in b.windows])
            turn()

        monkeypatch.setattr(
            WeightSpace, "turn_window", lambda _, watched=watched: watched()
        )
        train(problem, opt, K, start=start)
        monkeypatch.undo()
        found.append(turns[0])
    coasted, whole = (torch.cat([d.flatten() for d in ds]) for ds in found)
    # The EMA takes weights in once in eight steps instead of at each.
    assert (coasted - whole).norm() < 0.1 * whole.norm()


def test_coasting_measures_what_whole_steps_measure_along_the_drift():
    problem = regression()
    opt = coasting(problem)
    _coast(problem, opt)
    problem.loss(0).backward()
    opt.run.space.refresh()
    for p in problem.model.parameters():
        # Else the base's average of gradients would be measured: test_averages.py.
        del opt.state[p]["exp_avg"]
    part = opt.run.space.observe(None, Extent.DRIFT).wait().statistics
    whole = opt.run.space.observe(None).wait().statistics
    torch.testing.assert_close(part[:, 0], whole[:, 0])
    torch.testing.assert_close(part[:, 1 + DRIFT], whole[:, 1 + DRIFT])
    torch.testing.assert_close(part[:, 3 + DRIFT], whole[:, 3 + DRIFT])
    assert not part[:, [1 + STEP, 3 + STEP]].any()


@pytest.mark.parametrize("steps", range(1, 2 * K, 2))
def test_resume_while_coasting_equals_uninterrupted(steps):
    problem = regression()
    opt = coasting(problem)
    start = _coast(problem, opt) + steps
    train(problem, opt, steps, start=start - steps)
    twin = problem.twin()
    other = coasting(twin)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.run.controller.coasting
    assert train(problem, opt, 90, start=start) == train(twin, other, 90, start=start)
    assert_same_bits(problem.weights(), twin.weights())


def test_a_bad_step_while_coasting_is_skipped():
    problem = regression()
    opt = coasting(problem)
    start = _coast(problem, opt)
    before = problem.weights()
    opt.step(lambda: problem.loss(start) * float("nan"))
    assert_same_bits(before, problem.weights())
    train(problem, opt, 60, start=start + 1)
    assert all(bool(w.isfinite().all()) for w in problem.weights())


def test_a_parameter_that_gets_its_first_gradient_while_coasting_joins_in():
    problem = regression()
    late = torch.nn.Parameter(torch.zeros(3))
    opt = coasting(problem, late, max_predict_steps=0)
    start = _coast(problem, opt)
    for i in range(start, start + 60):
        opt.step(lambda i=i: problem.loss(i) + (late - 1).square().sum())
    assert 0.0 < float(opt.state[late]["hybrid_step"].abs().sum()) < 1.0
    assert bool(late.isfinite().all())
    assert float(late.detach().min()) > 0.01


def _without_windows():
    cramped = DriftConfig(window_steps=K, minimum=0.3, memory_budget=0.0)
    off = DriftConfig(enabled=False)
    return [{"memory": "low"}, {"drift": cramped}, {"drift": off}]


@pytest.mark.parametrize("changed", _without_windows(), ids=["low", "cramped", "off"])
@pytest.mark.parametrize("gain", [IDLE, GainConfig()], ids=["idle", "moving"])
def test_where_no_windows_fit_it_sleeps_deeply_and_never_coasts(changed, gain):
    problem = regression()
    opt = coasting(problem, gain=gain, **changed)
    slept = False
    for step in range(120):
        train(problem, opt, 1, start=step)
        assert not opt.run.controller.coasting
        slept = slept or opt.run.controller.sleeps_deeply
    assert slept is (gain is IDLE)
    assert (opt.statistics()["folded_moves"] == 0) is (gain is IDLE)
    assert all(w.isfinite().all() for w in problem.weights())


@pytest.mark.parametrize("changed", _without_windows(), ids=["low", "cramped", "off"])
def test_a_checkpoint_made_while_coasting_loads_where_no_windows_fit(changed):
    problem = regression()
    opt = coasting(problem)
    start = _coast(problem, opt)
    twin = problem.twin()
    other = coasting(twin, **changed)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not other.run.controller.coasting
    losses = train(twin, other, 90, start=start)
    reference = train(problem, opt, 90, start=start)
    assert max(losses) < 1.5 * max(reference)
