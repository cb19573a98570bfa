import copy

import pytest
import torch

from hybridopt import HybridPredictOptimizer, Phase
from tests.problems import BASES, assert_same_bits, regression, train, train_bare


@pytest.mark.parametrize("name", BASES)
def test_prediction_off_equals_bare_base_bit_for_bit(name):
    bare, wrapped = regression(), regression()
    base = BASES[name](list(bare.model.parameters()))
    train_bare(bare, base, 60)
    inner = BASES[name](list(wrapped.model.parameters()))
    opt = HybridPredictOptimizer(inner, enabled=False)
    train(wrapped, opt, 60)
    assert_same_bits(bare.weights(), wrapped.weights())
    for p, q in zip(bare.model.parameters(), wrapped.model.parameters(), strict=True):
        assert set(base.state[p]) == set(inner.state[q])


@pytest.mark.parametrize("name", BASES)
def test_run_that_ends_in_warmup_equals_bare_base_bit_for_bit(name):
    bare, wrapped = regression(), regression()
    train_bare(bare, BASES[name](list(bare.model.parameters())), 40)
    inner = BASES[name](list(wrapped.model.parameters()))
    opt = HybridPredictOptimizer(inner, warmup_steps=41)
    train(wrapped, opt, 40)
    assert opt.phase is Phase.WARMUP
    assert_same_bits(bare.weights(), wrapped.weights())


@pytest.mark.parametrize("name", BASES)
def test_train_off_continues_as_the_bare_base(name):
    wrapped = regression()
    opt = HybridPredictOptimizer(BASES[name](list(wrapped.model.parameters())))
    train(wrapped, opt, 50)
    opt.train_off()
    bare = wrapped.twin()
    base = BASES[name](list(bare.model.parameters()))
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(wrapped, opt, 20, start=50)
    for i in range(50, 70):
        base.zero_grad()
        bare.loss(i).backward()
        base.step()
    assert_same_bits(bare.weights(), wrapped.weights())
    assert opt.needs_backward


@pytest.mark.parametrize("closure_form", ["forward", "classic", "none"])
def test_all_loop_forms_give_the_same_weights(closure_form):
    reference, problem = regression(), regression()
    train(
        reference,
        HybridPredictOptimizer(BASES["adamw"](list(reference.model.parameters()))),
        40,
    )
    opt = HybridPredictOptimizer(BASES["adamw"](list(problem.model.parameters())))
    for i in range(40):
        if closure_form == "none":
            if opt.needs_backward:
                opt.zero_grad()
                problem.loss(i).backward()
            opt.step()
        else:

            def classic(i=i):
                opt.zero_grad()
                loss = problem.loss(i)
                loss.backward()
                return loss

            form = classic if closure_form == "classic" else lambda i=i: problem.loss(i)
            opt.step(form)
    if closure_form == "none":
        # Without a loss the predictor knows less, so only the warm-up is the same.
        assert opt.statistics()["steps"] == 40
        assert all(torch.isfinite(w).all() for w in problem.weights())
    else:
        assert_same_bits(reference.weights(), problem.weights())
