"""Weight space inside real training: what it keeps, and what it gives back."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer
from hybridopt.config import DriftConfig, LeadConfig, Prior, SecantConfig
from hybridopt.errors import ConfigError
from hybridopt.run import Components
from tests.parts import FixedPredictor
from tests.problems import assert_same_bits, regression, train

OFF = SecantConfig(enabled=False)


def _build(problem, **overrides):
    base = torch.optim.AdamW(problem.model.parameters(), lr=3e-3)
    return HybridPredictOptimizer(
        base, **{"predictor": Prior(), "secant": OFF, "warmup_steps": 5, **overrides}
    )


def test_evaluation_weights_are_on_the_way_to_the_ema_and_training_weights_come_back():
    problem = regression()
    beta = 0.9
    opt = _build(problem, warmup_steps=1000, drift=DriftConfig(beta=beta))
    ema = None
    for i in range(40):
        train(problem, opt, 1, start=i)
        # The first step fills the base's state; displacement counts from there.
        weights = problem.weights()
        if ema is None:
            ema = weights
        ema = [beta * e + (1 - beta) * w for e, w in zip(ema, weights, strict=True)]
    before = problem.weights()
    for share, shares in (((), 0.5), ((1.0,), 1.0), ((0.0,), 0.0), ((0.25,), 0.25)):
        with opt.evaluation_weights(*share):
            inside = problem.weights()
        for now, weight, average in zip(inside, before, ema, strict=True):
            expected = weight + shares * (average - weight)
            torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-5)
        assert_same_bits(before, problem.weights())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half", None])
def test_a_share_outside_of_the_way_is_refused(share):
    opt = _build(regression())
    with pytest.raises(ConfigError, match="share="):
        opt.evaluation_weights(share)


def test_a_share_may_be_a_number_of_numpy():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 20)
    found = []
    for share in (0.5, np.float32(0.5)):
        with opt.evaluation_weights(share):
            found.append(problem.weights())
    assert_same_bits(*found)


def test_evaluation_weights_come_back_after_an_exception():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 30)
    before = problem.weights()

    def interrupted():
        with opt.evaluation_weights():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same_bits(before, problem.weights())


def test_drift_direction_is_the_displacement_of_the_ema_over_the_window():
    problem = regression()
    drift = DriftConfig(beta=0.9, window_steps=8)
    opt = _build(problem, warmup_steps=1000, drift=drift, max_predict_steps=0)
    train(problem, opt, 1)
    space = opt.run.space
    parameter = next(problem.model.parameters())
    ema = parameter.detach().clone()
    start = ema.clone()
    for i in range(1, 21):
        train(problem, opt, 1, start=i)
        ema = 0.9 * ema + 0.1 * parameter.detach()
    window = opt.state[parameter]["hybrid_window"]
    torch.testing.assert_close(window, ema - start, rtol=1e-3, atol=1e-6)
    space.refresh()
    space.turn_window()
    torch.testing.assert_close(
        opt.state[parameter]["hybrid_drift"], ema - start, rtol=1e-3, atol=1e-6
    )
    assert not opt.state[parameter]["hybrid_window"].any()


def test_low_memory_keeps_anchor_and_step_only_and_resumes_exactly():
    problem = regression()
    opt = _build(problem, memory="low")
    train(problem, opt, 60)
    keys = {k for s in opt.state.values() for k in s if k.startswith("hybrid")}
    assert keys == {"hybrid_anchor", "hybrid_step"}
    assert opt.statistics()["folded_moves"] > 0
    before = problem.weights()
    with opt.evaluation_weights():
        assert_same_bits(before, problem.weights())
    twin = problem.twin()
    other = _build(twin, memory="low")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert train(problem, opt, 40, start=60) == train(twin, other, 40, start=60)
    assert_same_bits(problem.weights(), twin.weights())


@pytest.mark.parametrize(
    ("budget", "dtype"), [(64.0, torch.float32), (0.0, torch.bfloat16)]
)
def test_directions_lose_precision_before_they_exceed_the_budget(budget, dtype):
    problem = regression()
    opt = _build(problem, memory_budget=budget)
    train(problem, opt, 40)
    state = opt.state[next(problem.model.parameters())]
    assert state["hybrid_anchor"].dtype is torch.float32
    assert state["hybrid_step"].dtype is dtype
    assert state["hybrid_drift"].dtype is dtype


@pytest.mark.parametrize(
    ("drift", "lead", "copies"),
    [(0.0, 0.0, 2), (1024.0, 0.0, 3), (0.0, 1024.0, 3), (1024.0, 1024.0, 4)],
)
def test_drift_and_lead_take_a_copy_each_where_their_budgets_allow(drift, lead, copies):
    problem = regression()
    opt = _build(
        problem,
        memory_budget=0.0,
        drift=DriftConfig(memory_budget=drift),
        lead=LeadConfig(memory_budget=lead),
    )
    train(problem, opt, 40)
    weights = sum(p.nbytes for p in problem.model.parameters())
    assert opt.statistics()["extra_bytes"] == copies * weights
    assert opt.run.secant is None


def test_a_checkpoint_without_drift_gets_it_where_there_is_room_now():
    problem = regression()
    opt = _build(problem, drift=DriftConfig(memory_budget=0.0))
    train(problem, opt, 60)
    twin = problem.twin()
    other = _build(twin)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for state in other.state.values():
        assert not state["hybrid_drift"].any()
        assert not state["hybrid_window"].any()
    train(twin, other, 100, start=60)
    assert all(state["hybrid_drift"].any() for state in other.state.values())
    assert all(w.isfinite().all() for w in twin.weights())


def test_unused_and_frozen_parameters_are_left_alone():
    problem = regression()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    unused = nn.Parameter(torch.ones(2))
    base = torch.optim.AdamW([*problem.model.parameters(), frozen, unused], lr=3e-3)
    opt = HybridPredictOptimizer(base, predictor=Prior(), warmup_steps=5)
    train(problem, opt, 60)
    assert frozen.tolist() == [1.0, 1.0, 1.0]
    assert unused.tolist() == [1.0, 1.0]
    assert unused not in opt.state
    assert opt.statistics()["folded_moves"] > 0


def test_parameter_that_gets_its_first_gradient_late_joins_in():
    problem = regression()
    late = nn.Parameter(torch.zeros(3))
    base = torch.optim.AdamW([*problem.model.parameters(), late], lr=3e-3)
    opt = HybridPredictOptimizer(
        base, predictor=Prior(), warmup_steps=5, secant=OFF, max_predict_steps=0
    )
    train(problem, opt, 20)
    assert late not in opt.state
    for i in range(20, 60):
        opt.step(lambda i=i: problem.loss(i) + (late - 1).square().sum())
    assert "hybrid_step" in opt.state[late]
    assert float((late.detach() - 1).abs().max()) < 1.0


def test_sparse_gradient_gets_a_clear_error_and_changes_nothing():
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = HybridPredictOptimizer(torch.optim.SparseAdam(embedding.parameters()))
    before = embedding.weight.detach().clone()
    with pytest.raises(ConfigError, match="sparse"):
        opt.step(lambda: embedding(torch.tensor([1])).sum())
    assert torch.equal(before, embedding.weight)


def test_complex_parameters_move_like_pairs_of_reals():
    weight = nn.Parameter(torch.tensor([2.0 + 1.0j, -1.0 + 0.5j]))
    opt = HybridPredictOptimizer(
        torch.optim.SGD([weight], lr=0.25),
        components=Components(predictor=FixedPredictor(gain=0.5, progress=0.5)),
        secant=OFF,
        warmup_steps=1,
    )
    twin = weight.detach().clone()
    for step in range(6):
        opt.step(lambda: 0.5 * (weight.abs() ** 2).sum())
        displacement = -0.25 * twin
        twin = twin + displacement * (1.5 if step else 1.0)
        torch.testing.assert_close(weight.detach(), twin)


def test_mixed_dtypes_are_served_in_one_step():
    torch.manual_seed(0)
    double = nn.Linear(4, 4).double()
    single = nn.Linear(4, 1)
    base = torch.optim.SGD([*double.parameters(), *single.parameters()], lr=0.05)
    opt = HybridPredictOptimizer(base, predictor=Prior(), warmup_steps=3)
    x = torch.randn(16, 4)
    losses = [
        float(opt.step(lambda: single(double(x.double()).float()).square().mean()))
        for _ in range(60)
    ]
    assert losses[-1] < 0.5 * losses[0]
    assert opt.statistics()["folded_moves"] + opt.statistics()["predicted_steps"] > 0
