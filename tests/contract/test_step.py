"""What torch and the frameworks on it demand of one ``step()``; one rule per test."""

import copy
import weakref

import pytest
import torch

from hybridopt import Phase
from tests.contract.loops import WARMUP_STEPS, backward, build, drive
from tests.problems import BASES, assert_same_bits, regression, train


def base_tensors(opt) -> list[torch.Tensor]:
    """Every tensor in the base's own state, hybrid ones left out."""
    return [
        value.clone()
        for state in opt.base.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("hybrid")
    ]


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("position", [None, 0, 1])
def test_gradients_that_the_user_made_give_exactly_the_bases_step(name, position):
    problem = regression()
    opt = build(problem, name)
    phase = Phase.WARMUP if position is None else Phase.PREDICT
    drive(problem, opt, phase, position or 0)
    twin = problem.twin()
    base = BASES[name](list(twin.model.parameters()))
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    backward(problem, opt, 7)
    backward(twin, base, 7)
    base.step()
    if phase is Phase.PREDICT:
        opt.run.monitor.may_predict = lambda step: False  # no move behind the step
    real = opt.statistics()["real_steps"]
    assert opt.step() is None
    assert opt.statistics()["real_steps"] == real + 1
    assert_same_bits(twin.weights(), problem.weights())


def test_gradients_made_anew_at_a_reused_address_are_not_taken_for_old_ones():
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    seen = 0
    for i in range(30):
        predicted = not opt.needs_backward
        real = opt.statistics()["real_steps"]
        backward(problem, opt, i)
        opt.step()
        assert opt.statistics()["real_steps"] == real + 1
        seen += predicted
    assert seen > 5


def test_gradients_left_over_from_the_last_real_step_do_not_stop_a_prediction():
    problem = regression()
    opt = build(problem)
    i = 0
    while opt.needs_backward:
        backward(problem, opt, i)
        opt.step()
        i += 1
    assert all(p.grad is not None for p in problem.model.parameters())
    opt.step()
    assert opt.statistics()["predicted_steps"] == 1


def test_plain_closure_is_called_once_under_enable_grad_and_its_value_returned():
    problem = regression()
    opt = build(problem)
    marker, calls = object(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        problem.loss(0).backward()
        return marker

    with torch.no_grad():
        assert opt.step(closure) is marker
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert calls == [True]


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.CORRECT])
def test_exception_in_the_closure_changes_nothing(phase):
    problem = regression()
    opt = build(problem)
    drive(problem, opt, phase)
    weights, moments = problem.weights(), base_tensors(opt)
    steps = opt.statistics()["steps"]

    def broken():
        problem.loss(0).backward()
        raise RuntimeError("data loader broke")

    with pytest.raises(RuntimeError, match="data loader broke"):
        opt.step(broken)
    assert torch.is_grad_enabled()
    assert_same_bits(weights, problem.weights())
    assert_same_bits(moments, base_tensors(opt))
    assert opt.phase is phase
    assert opt.statistics()["steps"] == steps


def test_predicted_step_returns_a_finite_loss():
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    loss = opt.step(lambda: problem.loss(0))
    assert isinstance(loss, torch.Tensor)
    assert loss.ndim == 0
    assert not loss.requires_grad
    assert bool(loss.isfinite())


def test_predicted_step_without_any_known_loss_returns_none_and_not_nan():
    problem = regression()
    opt = build(problem)
    for i in range(12):
        if opt.needs_backward:
            backward(problem, opt, i)
        assert opt.step() is None
    assert opt.statistics()["predicted_steps"] > 0


def test_predicted_step_does_not_call_a_closure_that_can_be_left_out():
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    calls = []
    opt.step(lambda: calls.append(1))
    assert calls == []
    assert opt.statistics()["predicted_steps"] == 1


@pytest.mark.parametrize("skips_backward", [True, False])
def test_closure_that_must_be_called_is_called_and_decides_by_its_gradients(
    skips_backward,
):
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    calls = []

    def closure(*unexpected):
        calls.append(unexpected)
        opt.zero_grad()
        loss = problem.loss(3)
        if not skips_backward:
            loss.backward()
        return loss.detach()

    closure.hybridopt_always_call = True
    real = opt.statistics()["real_steps"]
    opt.step(closure)
    assert calls == [()]
    assert opt.statistics()["real_steps"] == real + (not skips_backward)
    assert opt.statistics()["predicted_steps"] == int(skips_backward)


def test_closure_that_must_be_called_keeps_gradients_of_earlier_micro_batches():
    problem, bare = regression(), regression()
    opt = build(problem)
    base = BASES["adamw"](list(bare.model.parameters()))

    def last(optimizer, of):
        def closure():
            loss = of.loss(1)
            loss.backward()
            return loss

        closure.hybridopt_always_call = True
        return closure

    backward(problem, opt, 0)
    opt.step(last(opt, problem))
    backward(bare, base, 0)
    base.step(last(base, bare))
    assert_same_bits(bare.weights(), problem.weights())


def test_closure_given_beside_stale_gradients_of_another_loss_wins():
    """A generator's backward fills the discriminator's gradients, for example."""
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    twin = problem.twin()
    base = BASES["adamw"](list(twin.model.parameters()))
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    backward(twin, base, 4)
    base.step()
    (1e3 * problem.loss(9)).backward()
    opt.run.monitor.may_predict = lambda step: False
    opt.step(lambda: problem.loss(4))
    assert_same_bits(twin.weights(), problem.weights())


def test_needs_backward_is_pure_and_stable_over_micro_batches():
    problem = regression()
    opt = build(problem)
    seen = set()
    for i in range(20):
        first = opt.needs_backward
        seen.add(first)
        before = copy.deepcopy(opt.run.state_dict())
        if first:
            opt.zero_grad()
        for micro in range(3):
            assert opt.needs_backward is first
            if first:
                problem.loss(3 * i + micro).backward()
        after = opt.run.state_dict()
        assert before["controller"]["plan"] == after["controller"]["plan"]
        assert before["counters"] == after["counters"]
        opt.step()
    assert seen == {True, False}


def test_step_without_gradients_is_the_predicted_one_or_harmless():
    problem = regression()
    opt = build(problem)
    weights = problem.weights()
    assert opt.step() is None
    assert_same_bits(weights, problem.weights())
    assert opt.statistics()["steps"] == 0
    drive(problem, opt, Phase.PREDICT)
    weights = problem.weights()
    opt.zero_grad()
    opt.step()
    assert opt.statistics()["predicted_steps"] == 1
    assert any(
        not torch.equal(a, b) for a, b in zip(weights, problem.weights(), strict=True)
    )


def test_zeroed_gradients_do_not_stop_a_prediction():
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    for p in problem.model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.statistics()["predicted_steps"] == 1


def test_predicted_step_leaves_no_gradients_behind():
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT)
    opt.step(lambda: problem.loss(0))
    assert all(p.grad is None for p in problem.model.parameters())


def test_gradients_of_a_step_are_not_kept_alive_by_the_optimizer():
    problem = regression()
    opt = build(problem)
    train(problem, opt, WARMUP_STEPS)
    references = [weakref.ref(p.grad) for p in problem.model.parameters()]
    opt.zero_grad()
    assert all(reference() is None for reference in references)
