"""A rollback gives everything back bit for bit; NaN gets nowhere."""

import copy
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybridopt import HybridPredictOptimizer
from hybridopt.config import GainConfig, Prior
from hybridopt.errors import ClosureError, RecoveryAction
from hybridopt.types import Mover
from tests.problems import BASES, assert_same_bits, regression, train


def _build(problem, name="adamw", **overrides):
    base = BASES[name](list(problem.model.parameters()))
    return HybridPredictOptimizer(
        base,
        model=problem.model,
        **{"predictor": Prior(), "warmup_steps": 4, **overrides},
    )


def _base_state(opt):
    return [
        v.clone()
        for s in opt.base.state.values()
        for k, v in s.items()
        if isinstance(v, torch.Tensor) and not k.startswith("hybrid")
    ]


def _buffers(problem):
    return [b.clone() for b in problem.model.buffers()]


def _finite(problem, opt):
    tensors = [*problem.weights(), *_base_state(opt), *_buffers(problem)]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


@given(
    seed=st.integers(0, 10_000),
    faults=st.lists(
        st.tuples(
            st.integers(1, 60),
            st.sampled_from(["nan_loss", "inf_loss", "nan_grad", "huge_loss"]),
        ),
        min_size=1,
        max_size=4,
    ),
    name=st.sampled_from(["sgd_momentum", "adamw", "rmsprop"]),
    initial=st.sampled_from([0.1, 3.0]),
)
@example(6, [(1, "huge_loss"), (2, "huge_loss")], "sgd_momentum", 0.1)
@settings(max_examples=25, deadline=None)
def test_rollback_is_bit_exact_whatever_happens(seed, faults, name, initial):
    problem = regression(seed, batches=64, batch_norm=True)
    opt = _build(problem, name, gain=GainConfig(initial=initial))
    faulty = dict(faults)
    for i in range(70):
        kind = faulty.get(i)

        def closure(i=i, kind=kind):
            loss = problem.loss(i)
            match kind:
                case "nan_loss":
                    return loss * float("nan")
                case "inf_loss":
                    return loss + float("inf")
                case "huge_loss":
                    return loss * 1e6
            return loss

        handles = []
        if kind == "nan_grad":
            weight = next(problem.model.parameters())
            handles.append(weight.register_hook(lambda g: g * float("nan")))

        moved = opt.run.space.moved
        anchored = opt.run.space.anchored
        before_base = _base_state(opt)
        before_buffers = [b.clone() for b in opt.run.buffers]
        anchor = [
            opt.base.state[p]["hybrid_anchor"].clone()
            for p in problem.model.parameters()
            if p in opt.base.state
        ]
        opt.step(closure)
        for handle in handles:
            handle.remove()
        record = opt.last_step
        retried = record.mover is Mover.SECANT  # from the anchor, a shorter move
        if record.action is RecoveryAction.ROLL_BACK and retried:
            assert_same_bits(before_base, _base_state(opt))
        elif record.action is RecoveryAction.ROLL_BACK:
            assert moved
            assert anchored
            assert_same_bits(anchor, problem.weights())
            assert_same_bits(before_base, _base_state(opt))
            assert_same_bits(before_buffers, _buffers(problem))
        if record.action is RecoveryAction.SKIP_STEP:
            assert_same_bits(before_base, _base_state(opt))
        assert all(bool(torch.isfinite(w).all()) for w in problem.weights())
        assert all(bool(torch.isfinite(t).all()) for t in _base_state(opt))
    assert opt.statistics()["steps"] == 70


@pytest.mark.parametrize("when", range(0, 40, 3))
def test_nan_loss_at_any_time_never_reaches_weights_or_base_state(when):
    problem = regression()
    opt = _build(problem)
    for i in range(60):
        factor = float("nan") if i == when else 1.0
        opt.step(lambda i=i, f=factor: problem.loss(i) * f)
        assert _finite(problem, opt)
    assert opt.statistics()["steps"] == 60


def test_nan_in_the_predictor_never_reaches_the_weights():
    class Poisoned:
        """A predictor whose coefficients are not numbers."""

        moving = False

        def observe(self, observation):
            self.size = observation.dots.shape

        def forecast(self, slopes):
            from hybridopt.types import Forecast

            return Forecast(torch.full(self.size, float("nan")), 1.0, 9.0, 9.0)

        def feedback(self, outcome):
            self.outcome = outcome

        def reset(self):
            self.size = None

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            self.size = None

    from hybridopt.run import Components

    problem = regression()
    opt = _build(problem, components=Components(predictor=Poisoned()))
    for i in range(40):
        opt.step(lambda i=i: problem.loss(i))
        assert _finite(problem, opt)


@pytest.mark.parametrize("when", [2, 12, 25])
def test_exception_in_the_closure_changes_nothing(when):
    problem = regression()
    opt = _build(problem, max_predict_steps=0)  # every step calls the closure
    train(problem, opt, when)
    before = copy.deepcopy(opt.state_dict())
    weights, phase = problem.weights(), opt.phase

    def broken():
        problem.loss(when).backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(broken)
    assert_same_bits(weights, problem.weights())
    assert opt.phase is phase
    after = opt.state_dict()
    for key in before["state"]:
        assert_same_bits(
            [v for v in before["state"][key].values() if isinstance(v, torch.Tensor)],
            [v for v in after["state"][key].values() if isinstance(v, torch.Tensor)],
        )
    train(problem, opt, 5, start=when)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: None, "None"),
        (lambda loss: "loss", "str"),
        (lambda loss: loss.detach(), "without a graph"),
        (lambda loss: loss.reshape(1).expand(3) * 1.0, "must be a scalar"),
        (lambda loss: float(loss.detach()), "float"),
    ],
)
def test_closure_that_gives_nothing_gets_a_clear_error(result, message):
    problem = regression()
    opt = _build(problem)
    weights = problem.weights()
    with pytest.raises(ClosureError, match=message) as caught:
        opt.step(lambda: result(problem.loss(0)))
    assert "opt.step(lambda:" in str(caught.value)
    assert caught.value.recovery is RecoveryAction.FIX_CONFIGURATION
    assert_same_bits(weights, problem.weights())


def test_user_rng_is_untouched_by_predicted_steps():
    def draws(enabled):
        torch.manual_seed(3)
        random.seed(3)
        problem = regression()
        dropout = torch.nn.Dropout(0.5)
        opt = _build(problem, enabled=enabled)
        seen = []
        real = 0
        for _ in range(200):
            if not opt.needs_backward:
                opt.step()
                continue
            x, y = problem.batches[real]
            real += 1

            def closure(x=x, y=y):
                mask = dropout(torch.ones(16, 6))
                seen.append(mask.clone())
                return torch.nn.functional.mse_loss(problem.model(x * mask), y)

            opt.step(closure)
            if real == 30:
                break
        return seen, torch.get_rng_state(), random.getstate()

    plain, hybrid = draws(False), draws(True)
    assert len(plain[0]) == len(hybrid[0]) == 30
    assert_same_bits(plain[0], hybrid[0])
    assert torch.equal(plain[1], hybrid[1])
    assert plain[2] == hybrid[2]


def test_validation_touches_neither_batch_norm_nor_rng():
    problem = regression(batch_norm=True)
    opt = _build(problem, "adamw_slow", validation_interval=1)
    validated = 0
    for i in range(150):
        validates = opt.run.controller.plan.validates
        buffers, rng = _buffers(problem), torch.get_rng_state()
        weights = problem.weights()
        calls = []

        def closure(i=i, calls=calls):
            calls.append(torch.is_grad_enabled())
            torch.rand(3)
            return problem.loss(i)

        opt.step(closure)
        if validates:
            validated += 1
            assert calls == [False]
            assert_same_bits(buffers, _buffers(problem))
            assert torch.equal(rng, torch.get_rng_state())
            if opt.last_step.action is not RecoveryAction.ROLL_BACK:
                assert_same_bits(weights, problem.weights())
    assert validated > 0
    assert opt.statistics()["validated_steps"] == validated
