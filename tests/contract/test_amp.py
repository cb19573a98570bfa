"""Gradient scaling and autocast: real steps pass through, predicted ones go around."""

import copy

import pytest
import torch

from hybridopt import Phase
from tests.contract.loops import backward, build, drive, wrap
from tests.problems import BASES, assert_same_bits, regression, train


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def scaled_step(problem, opt, scaling, index):
    """The loop that the documentation gives for float16."""
    if not opt.needs_backward:
        opt.step()
        return
    opt.zero_grad()
    scaling.scale(problem.loss(index)).backward()
    scaling.unscale_(opt)
    scaling.step(opt)
    scaling.update()


def test_scaling_flag_of_a_fused_base_is_not_exposed():
    """GradScaler would hand the scale to the wrapper, and the fused base not see it."""
    problem, bare = regression(), regression()
    base = torch.optim.SGD(problem.model.parameters(), lr=0.05, fused=True)
    assert base._step_supports_amp_scaling
    opt = wrap(base)
    assert not hasattr(opt, "_step_supports_amp_scaling")
    scaling = scaler()
    scaling.scale(problem.loss(0)).backward()
    scaling.step(opt)
    scaling.update()
    plain = torch.optim.SGD(bare.model.parameters(), lr=0.05, fused=True)
    bare.loss(0).backward()
    plain.step()
    for a, b in zip(bare.weights(), problem.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_scaled_loop_equals_the_plain_one():
    plain, scaled = regression(), regression()
    left, right = build(plain), build(scaled)
    scaling = scaler()
    for i in range(25):
        if left.needs_backward:
            backward(plain, left, i)
        left.step()
        scaled_step(scaled, right, scaling, i)
    assert right.statistics()["predicted_steps"] > 5
    # A power of two scales exactly.
    assert_same_bits(plain.weights(), scaled.weights())


def test_step_without_gradients_cannot_go_through_a_scaler():
    """Why the documented loop goes around it, and why fp16 frameworks are refused."""
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    opt.zero_grad()
    scaling = scaler()
    scaling.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks"):
        scaling.step(opt)


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.CORRECT])
def test_step_that_the_scaler_skips_is_retried_as_the_same_phase(phase):
    problem = regression()
    opt = build(problem)
    drive(problem, opt, phase)
    scaling = scaler()
    weights, counted = problem.weights(), opt.statistics()
    scaling.scale(problem.loss(0) * float("inf")).backward()
    scaling.unscale_(opt)
    scaling.step(opt)
    scaling.update()
    assert scaling.get_scale() == 512.0
    assert opt.phase is phase
    assert opt.needs_backward
    assert_same_bits(weights, problem.weights())
    assert opt.statistics() == counted
    scaled_step(problem, opt, scaling, 1)
    assert opt.statistics()["real_steps"] == counted["real_steps"] + 1


def test_infinite_gradient_without_a_scaler_never_reaches_the_base():
    problem = regression()
    opt = build(problem)
    train(problem, opt, 2)
    weights = problem.weights()
    moments = copy.deepcopy(opt.base.state_dict()["state"])
    (problem.loss(0) * float("inf")).backward()
    opt.step()
    assert_same_bits(weights, problem.weights())
    for index, values in opt.base.state_dict()["state"].items():
        assert torch.equal(values["exp_avg"], moments[index]["exp_avg"])
    assert opt.statistics()["skipped_steps"] == 1


def test_bfloat16_autocast_needs_nothing():
    problem = regression()
    opt = build(problem)
    losses = []
    for i in range(40):

        def closure(i=i):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return problem.loss(i)

        losses.append(float(opt.step(closure)))
    assert opt.statistics()["predicted_steps"] > 5
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_precisions_train_and_resume(name, dtype):
    problem = regression()
    problem.model.to(dtype)
    problem.batches = [(x.to(dtype), y.to(dtype)) for x, y in problem.batches]
    opt = build(problem, name)
    assert BASES[name]
    steps = drive(problem, opt, Phase.PREDICT, position=1)
    twin = problem.twin()
    other = build(twin, name)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(problem, opt, 12, start=steps)
    train(twin, other, 12, start=steps)
    assert_same_bits(problem.weights(), twin.weights())
    assert all(w.dtype is dtype for w in problem.weights())
