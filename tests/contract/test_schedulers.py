"""Learning-rate schedulers on the wrapper and on the base drive the base alike."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler

from hybridopt import Phase
from tests.contract.loops import backward, build, drive
from tests.problems import BASES, assert_same_bits, regression, train

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.97**n),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.97),
    "step": lambda o: lr_scheduler.StepLR(o, 5, 0.5),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [4, 9], 0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 6),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 15),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 30),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, 5),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 3e-3, total_steps=40),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.ConstantLR(o, 0.5, 4)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.95)],
        [5],
    ),
}
STEPS = 25


def run(make, on_base: bool, **overrides):
    """Rates, momenta and weights of a run whose scheduler sits here or there."""
    problem = regression()
    opt = build(problem, **overrides)
    scheduler = make(opt.base if on_base else opt)
    seen = []
    for i in range(STEPS):
        opt.step(lambda i=i: problem.loss(i))
        scheduler.step()
        group = opt.base.param_groups[0]
        seen.append((float(group["lr"]), group["betas"]))
    return seen, problem.weights(), opt


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_accepts_the_wrapper_and_reaches_the_base(name):
    on_wrapper = run(SCHEDULERS[name], on_base=False)
    on_base = run(SCHEDULERS[name], on_base=True)
    assert on_wrapper[0] == on_base[0]
    assert_same_bits(on_wrapper[1], on_base[1])
    assert len({rate for rate, _ in on_wrapper[0]}) > 1
    assert on_wrapper[2].statistics()["steps"] == STEPS


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "cyclic"])
def test_schedule_equals_that_of_the_bare_base(name):
    problem = regression()
    base = BASES["adamw"](list(problem.model.parameters()))
    scheduler = SCHEDULERS[name](base)
    expected = []
    for i in range(STEPS):
        base.zero_grad()
        problem.loss(i).backward()
        base.step()
        scheduler.step()
        expected.append((base.param_groups[0]["lr"], base.param_groups[0]["betas"]))
    assert run(SCHEDULERS[name], on_base=False)[0] == expected


def test_rate_is_read_at_every_step_never_at_construction():
    problem = regression()
    opt = build(problem, "sgd")
    drive(problem, opt, Phase.PREDICT)
    opt.param_groups[0]["lr"] = 0.0
    weights = problem.weights()
    for i in range(4):
        if opt.needs_backward:
            backward(problem, opt, i)
        opt.step()
    assert_same_bits(weights, problem.weights())


def test_scheduler_with_a_tensor_rate_works():
    problem = regression()
    base = torch.optim.AdamW(problem.model.parameters(), lr=torch.tensor(3e-3))
    opt = build(problem).__class__(base, warmup_steps=2)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
    rate = base.param_groups[0]["lr"]
    for i in range(10):
        opt.step(lambda i=i: problem.loss(i))
        scheduler.step()
    assert base.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(3e-3 * 0.9**10)


def test_plateau_scheduler_takes_the_loss_of_every_step_predicted_ones_too():
    problem = regression()
    opt = build(problem)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=2, factor=0.5)
    for i in range(60):
        loss = opt.step(lambda i=i: problem.loss(i))
        scheduler.step(loss)
    assert opt.statistics()["predicted_steps"] > 0
    assert opt.base.param_groups[0]["lr"] < 3e-3
    assert scheduler.best > 0


def test_scheduler_still_reaches_the_base_after_a_load():
    """A load replaces the groups; an alias of the old ones goes stale."""
    problem = regression()
    opt = build(problem)
    train(problem, opt, 3)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    train(problem, opt, 2, start=3)
    scheduler.step()
    assert opt.base.param_groups[0]["lr"] == pytest.approx(1.5e-3)


def test_weight_averaging_of_torch_takes_the_wrapper():
    problem = regression()
    opt = build(problem)
    averaged = torch.optim.swa_utils.AveragedModel(problem.model)
    scheduler = torch.optim.swa_utils.SWALR(opt, swa_lr=1e-3, anneal_epochs=3)
    for i in range(10):
        opt.step(lambda i=i: problem.loss(i))
        averaged.update_parameters(problem.model)
        scheduler.step()
    assert opt.base.param_groups[0]["lr"] == pytest.approx(1e-3)
