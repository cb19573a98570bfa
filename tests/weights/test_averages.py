"""The base's own average of gradients measures the drift, where it can."""

import copy

import pytest
import torch

from hybridopt.control.controller import SETTLING_SHARE
from hybridopt.types import DRIFT, STEP, Extent
from hybridopt.weights.averages import averaged_gradients, gradient_memory
from tests.problems import regression, train
from tests.weights.test_coasting import K, coasting, train_until


def parameters():
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("build", "memory"),
    [
        (lambda p: torch.optim.AdamW(p), 0.9),
        (lambda p: torch.optim.Adam(p, betas=(0.95, 0.999)), 0.95),
        (lambda p: torch.optim.NAdam(p), 0.9),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 0.9),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.99), 0.0),
        (lambda p: torch.optim.AdamW(p, betas=(0.5, 0.999)), 0.0),
        (lambda p: torch.optim.AdamW(p, maximize=True), 0.0),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), 0.0),
        (
            lambda p: torch.optim.AdamW(
                [{"params": p[:1]}, {"params": p[1:], "betas": (0.0, 0.99)}]
            ),
            0.0,
        ),
        (
            lambda p: torch.optim.AdamW(
                [{"params": p[:1]}, {"params": p[1:], "betas": (0.8, 0.99)}]
            ),
            0.9,
        ),
    ],
)
def test_which_bases_keep_an_average_that_spans_a_few_steps(build, memory):
    assert gradient_memory(build(parameters())) == memory


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.999)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9),
    ],
)
def test_averages_come_in_the_units_of_a_gradient(build):
    tensors = parameters()
    base = build(tensors)
    for _ in range(200):
        for p in tensors:
            p.grad = torch.full_like(p, 3.0)
        base.step()
    flat = [p.detach().view(-1) for p in tensors]
    found = averaged_gradients(base, tensors, flat)
    for average, like in zip(found, flat, strict=True):
        torch.testing.assert_close(average, torch.full_like(like, 3.0))


def test_without_state_or_with_state_elsewhere_there_is_none():
    tensors = parameters()
    base = torch.optim.AdamW(tensors)
    assert averaged_gradients(base, tensors, tensors) is None
    assert not base.state  # asking has not made any
    for p in tensors:
        p.grad = torch.ones_like(p)
    base.step()
    assert averaged_gradients(base, tensors, tensors) is not None
    base.state[tensors[0]]["exp_avg"] = torch.zeros(3, device="meta")
    assert averaged_gradients(base, tensors, tensors) is None


@pytest.mark.parametrize("lost", [False, True])
def test_coasting_measures_the_average_along_the_drift(lost):
    problem = regression()
    opt = coasting(problem)
    step = train_until(problem, opt, Extent.DRIFT)
    if lost:
        for p in problem.model.parameters():
            del opt.state[p]["exp_avg"]
    loss = problem.loss(step)
    loss.backward()
    opt.run.space.refresh()
    reading = opt.run.space.observe(loss, Extent.DRIFT).wait()
    for row, p in enumerate(problem.model.parameters()):
        held = opt.state[p]
        measured = p.grad if lost else held["exp_avg"]
        drift = held["hybrid_drift"].float()
        values = reading.statistics[row]
        assert float(values[0]) == pytest.approx(float(p.grad.square().sum()), rel=1e-4)
        product = float((measured * drift).sum())
        assert float(values[1 + DRIFT]) == pytest.approx(product, rel=1e-3, abs=1e-12)
        assert float(values[1 + STEP]) == 0.0
        assert float(values[3 + DRIFT]) == pytest.approx(
            float(drift.square().sum()), rel=1e-3
        )


def test_where_nothing_averages_every_other_step_is_measured():
    intervals = []
    for betas in ((0.9, 0.999), (0.5, 0.999)):
        problem = regression()
        opt = coasting(problem)
        for group in opt.param_groups:
            group["betas"] = betas
        step = train_until(problem, opt, Extent.GLANCE)
        extents = []
        for i in range(step, step + 40):
            extents.append(opt.run.controller.extent)
            train(problem, opt, 1, start=i)
        glanced, measured = (extents.count(e) for e in (Extent.GLANCE, Extent.DRIFT))
        intervals.append(glanced / measured)
    assert intervals[0] > 2 * intervals[1]


def test_a_resumed_run_measures_the_same_steps():
    problem, again = regression(), regression()
    opt = coasting(problem)
    step = train_until(problem, opt, Extent.GLANCE)
    train(problem, opt, 3, start=step)
    other = coasting(again)
    again.model.load_state_dict(problem.model.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, o in ((problem, opt), (again, other)):
        train(p, o, 30, start=step + 3)
    for a, b in zip(problem.weights(), again.weights(), strict=True):
        assert torch.equal(a, b)


def test_an_average_that_made_the_direction_does_not_judge_it():
    problem = regression()
    opt = coasting(problem)
    step = train_until(problem, opt, Extent.GLANCE)
    measured, left_out = [], 0
    for i in range(step, step + 8 * K):
        controller = opt.run.controller
        extent, share = controller.extent, 1.0 - controller._turns_in / K
        if extent is Extent.DRIFT:
            measured.append(share)
        left_out += extent is Extent.GLANCE and share < SETTLING_SHARE
        train(problem, opt, 1, start=i)
    assert left_out > 4
    assert min(measured) >= SETTLING_SHARE


def test_observations_say_whether_an_average_stood_in_for_the_gradient(monkeypatch):
    problem = regression()
    opt = coasting(problem)
    seen, absorb = [], opt.run.predictor.window.absorb
    monkeypatch.setattr(
        opt.run.predictor.window, "absorb", lambda one: (seen.append(one), absorb(one))
    )
    step = train_until(problem, opt, Extent.DRIFT)
    extents = {}
    for i in range(step, step + 3 * K):
        extents[i] = opt.run.controller.extent
        train(problem, opt, 1, start=i)
    found = {(extents[one.step], one.drift_memory) for one in seen[-2 * K :]}
    found = {pair for pair in found if pair[0] is not Extent.GLANCE}
    assert found >= {(Extent.WHOLE, 0.0), (Extent.DRIFT, 0.9)}
    assert found <= {(Extent.WHOLE, 0.0), (Extent.DRIFT, 0.9), (Extent.TURN, 0.9)}
