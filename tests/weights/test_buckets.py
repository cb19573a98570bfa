"""What is kept from step to step, and when it is not trusted any more."""

import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import Prior, SecantConfig
from hybridopt.weights.module_buffers import list_buffers
from tests.parts import FixedPredictor
from tests.problems import assert_same_bits, regression, train

OFF = SecantConfig(enabled=False)


def _build(problem, **overrides):
    base = torch.optim.AdamW(problem.model.parameters(), lr=1e-3)
    return HybridPredictOptimizer(
        base, **{"predictor": Prior(), "secant": OFF, "warmup_steps": 5, **overrides}
    )


def _predicting(problem):
    from hybridopt.run import Components

    predictor = FixedPredictor(gain=3.0, progress=8.0)
    opt = _build(problem, components=Components(predictor=predictor))
    for step in range(200):
        train(problem, opt, 1, start=step)
        if opt.phase is Phase.PREDICT:
            return opt
    raise AssertionError("no step was predicted")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_the_user_spoiled_are_not_moved_on(value):
    problem = regression()
    opt = _predicting(problem)
    anchors = [opt.state[p]["hybrid_anchor"] for p in problem.model.parameters()]
    kept = [a.clone() for a in anchors]
    with torch.no_grad():
        next(problem.model.parameters()).view(-1)[0] = value
    opt.step(lambda: problem.loss(0))
    assert opt.statistics()["rolled_back_steps"] == 1
    assert_same_bits(problem.weights(), kept)


def test_a_move_that_would_overflow_is_refused():
    problem = regression()
    opt = _predicting(problem)
    for p in problem.model.parameters():
        opt.state[p]["hybrid_step"].fill_(3e38)
    opt.run.space._table.forget()
    before = [opt.state[p]["hybrid_anchor"].clone() for p in problem.model.parameters()]
    opt.step(lambda: problem.loss(0))
    assert opt.statistics()["rolled_back_steps"] == 1
    assert_same_bits(problem.weights(), before)


def test_large_weights_are_moved_as_far_as_floats_go():
    problem = regression()
    opt = _predicting(problem)
    first = next(problem.model.parameters())
    with torch.no_grad():
        first.fill_(3.4e38)
    opt.step(lambda: problem.loss(0))
    assert bool(first.isfinite().all())


def _move_weights(problem, opt):
    """``p.data = other`` keeps the parameter; views of the old memory are stale."""
    for p in problem.model.parameters():
        p.data = p.data.clone()


def _move_state(problem, opt):
    """Who offloads state replaces its tensors inside the same dictionaries."""
    for held in opt.state.values():
        for key, value in held.items():
            held[key] = value.clone()


@pytest.mark.parametrize("moves", [_move_weights, _move_state])
def test_what_was_moved_away_and_back_is_followed(moves):
    runs = []
    for replaces in (False, True):
        problem = regression()
        opt = _build(problem, max_predict_steps=0)
        for step in range(60):
            if replaces and step % 7 == 0:
                moves(problem, opt)
            train(problem, opt, 1, start=step)
            if opt.run.space.ready:
                (bucket,) = opt.run.space.tracked_buckets()
                first = next(iter(opt.state.values()))["hybrid_step"]
                assert bucket.steps[0].data_ptr() == first.data_ptr()
        runs.append(problem.weights())
        assert opt.statistics()["folded_moves"] > 10
    assert_same_bits(*runs)


def test_norms_of_directions_are_those_of_what_is_stored():
    problem = regression()
    opt = _build(problem, max_predict_steps=0)
    for step in range(130):
        train(problem, opt, 1, start=step)
        for bucket in opt.run.space._table._buckets:
            for kept, part in ((bucket.step_sq, "step"), (bucket.drift_sq, "drift")):
                if kept is not None:
                    stored = [opt.state[p][f"hybrid_{part}"] for p in bucket.sources]
                    squares = [float(s.double().square().sum()) for s in stored]
                    assert kept.tolist() == pytest.approx(squares, rel=1e-5)
    assert bucket.step_sq is not None
    assert bucket.drift_sq is not None
    assert float(bucket.drift_sq.sum()) > 0.0


def test_buffers_are_listed_as_torch_does():
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), shared), nn.Flatten())
    model.register_buffer("own", torch.ones(2))
    model.register_buffer("empty", None)
    model.absent = None
    model[2].register_buffer("again", model.own)
    found, wanted = list_buffers(model), list(model.buffers())
    assert len(found) == len(wanted) == 4
    assert all(a is b for a, b in zip(found, wanted, strict=True))


def test_lists_and_norms_outlive_predicted_steps():
    problem = regression()
    opt = _predicting(problem)
    (before,) = opt.run.space._table._buckets
    predicted = 0
    while opt.phase is Phase.PREDICT:
        opt.step(lambda: problem.loss(0))
        assert before.step_sq is not None
        assert before.vouched
        predicted += 1
    train(problem, opt, 1, start=1)
    (after,) = opt.run.space._table._buckets
    assert after is before
    assert predicted > 0
