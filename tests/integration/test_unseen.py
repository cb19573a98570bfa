"""Steps that the host never sees keep every promise: forced here on the CPU.

With ``skips_on=("cpu",)`` and a fused base, sleeping steps pass as on a GPU.
"""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer
from hybridopt.checkpoint import _fill
from hybridopt.config import DriftConfig, GainConfig, LeadConfig, Prior, SecantConfig
from hybridopt.errors import CheckpointError, RecoveryAction
from hybridopt.run import Components
from tests.parts import watch_unseen
from tests.problems import assert_same_bits, regression, spoiled, train, train_bare

FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-4, fused=True),
    "sgd": lambda p: torch.optim.SGD(
        p, lr=2e-3, momentum=0.9, weight_decay=1e-3, fused=True
    ),
}
QUIET = {
    "gain": GainConfig(rate=0.0, initial=0.0, minimum=0.0),
    "drift": DriftConfig(enabled=False),
    "lead": LeadConfig(enabled=False),
    "secant": SecantConfig(enabled=False),
    "max_predict_steps": 0,
}
"""Nothing but the base moves weights, so the optimizer soon sleeps."""


def _build(problem, name="adamw", **overrides):
    return HybridPredictOptimizer(
        FUSED[name](list(problem.model.parameters())),
        components=Components(skips_on=("cpu",)),
        **{"predictor": Prior(), "warmup_steps": 6, **overrides},
    )


def _coasting(problem, **overrides):
    """Light sleep: the drift windows go on."""
    drift = DriftConfig(window_steps=12)
    return _build(problem, **{**QUIET, "drift": drift, **overrides})


@pytest.fixture
def unseen(monkeypatch):
    return watch_unseen(monkeypatch)


def _until_unseen(problem, opt, found, start=0, many=1):
    """Train until some steps in a row have passed unseen; the next index."""
    for step in range(start, start + 400):
        train(problem, opt, 1, start=step)
        if found[-many:] == list(range(step + 1 - many, step + 1)):
            return step + 1
    raise AssertionError("none passed unseen")


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("build", [_build, _coasting])
def test_most_sleeping_steps_pass_unseen(name, build, unseen):
    problem = regression()
    overrides = QUIET if build is _build else {}
    opt = build(problem, name=name, **overrides)
    if build is _coasting:
        opt.run.controller.coasting, opt.run.controller.sleep_steps = True, 10_000
    train(problem, opt, 200)
    assert len(unseen) > (100 if build is _build else 60)
    assert opt.statistics()["real_steps"] == 200


@pytest.mark.parametrize("name", FUSED)
def test_unseen_steps_are_the_bare_bases_bit_for_bit(name, unseen):
    bare, wrapped = regression(), regression()
    train_bare(bare, FUSED[name](list(bare.model.parameters())), 150)
    train(wrapped, _build(wrapped, name, **QUIET), 150)
    assert len(unseen) > 50
    assert_same_bits(bare.weights(), wrapped.weights())


def test_an_unseen_step_measures_nothing_and_looks_nothing_up(unseen, monkeypatch):
    problem = regression()
    opt = _build(problem, **QUIET)
    step = _until_unseen(problem, opt, unseen, many=2)
    for name in ("observe", "complete"):
        monkeypatch.setattr(type(opt.run.space), name, None)
    monkeypatch.setattr(type(opt.run.monitor), "judge", None)
    train(problem, opt, 3, start=step)
    assert unseen[-3:] == [step, step + 1, step + 2]


def test_drift_windows_turn_when_they_would_have(unseen):
    turned = []
    for watched in (False, True):
        problem = regression()
        opt = _coasting(problem, collect_metrics=watched)
        turns = []
        for step in range(200):
            before = opt.run.predictor.window.windows
            train(problem, opt, 1, start=step)
            if opt.run.predictor.window.windows > before:
                turns.append(step)
        turned.append(turns)
    assert len(unseen) > 20
    assert turned[0] == turned[1]
    assert len(turned[0]) > 10


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_unseen_and_counted(name, bad, where, unseen):
    problem = regression()
    opt = _build(problem, name, **QUIET)
    step = _until_unseen(problem, opt, unseen, many=2)
    twin = copy.deepcopy((problem, opt))
    before, count = problem.weights(), len(unseen)

    opt.step(spoiled(problem, opt, step, where, bad))
    assert len(unseen) == count + 1
    assert_same_bits(before, problem.weights())
    assert opt.last_step.action is RecoveryAction.SKIP_STEP
    assert math.isfinite(opt.last_step.loss) == (where == "gradient")
    train(problem, opt, 80, start=step)
    train(*twin, 80, start=step)
    # As if it had never been, but for the rhythm of what is measured.
    assert_same_bits(problem.weights(), twin[0].weights())
    statistics = opt.statistics()
    assert statistics["skipped_steps"] == 1
    assert statistics["real_steps"] == step + 80


def test_skips_are_counted_when_somebody_asks(unseen):
    problem = regression()
    opt = _build(problem, **QUIET)
    step = _until_unseen(problem, opt, unseen, many=2)
    for _ in range(3):
        opt.step(lambda: problem.loss(step) * math.nan)
    assert opt.statistics()["skipped_steps"] == 3
    assert opt.statistics()["real_steps"] == step
    opt.step(lambda: problem.loss(step) * math.nan)
    other = _build(problem.twin(), **QUIET)
    other.load_state_dict(opt.state_dict())
    assert other.statistics()["skipped_steps"] == 4


def test_the_last_step_tells_its_loss_when_asked(unseen):
    problem = regression()
    opt = _build(problem, **QUIET)
    step = _until_unseen(problem, opt, unseen)
    value = opt.step(lambda: problem.loss(step))
    assert math.isnan(opt.run.last_step.loss)
    assert opt.last_step.loss == float(value)
    assert opt.last_step.action is RecoveryAction.CONTINUE
    value.zero_()  # what the user does with the loss is not seen
    assert opt.last_step.loss != 0.0


def test_losses_that_are_host_numbers_or_not_there(unseen):
    problem = regression()
    opt = _build(problem, **QUIET)
    step = _until_unseen(problem, opt, unseen)

    def classic():
        opt.zero_grad()
        loss = problem.loss(step)
        loss.backward()
        return loss.item()

    value = opt.step(classic)
    assert unseen[-1] == step
    assert opt.last_step.loss == value
    opt.zero_grad()
    problem.loss(step + 1).backward()
    opt.step()
    assert unseen[-1] == step + 1
    before = problem.weights()
    opt.step(lambda: classic() * math.nan)
    assert unseen[-1] == step + 1
    assert_same_bits(before, problem.weights())


@pytest.mark.parametrize("build", [_build, _coasting])
def test_resume_between_unseen_steps_equals_uninterrupted(build, unseen, tmp_path):
    problem = regression()
    overrides = {} if build is _coasting else QUIET
    opt = build(problem, **overrides)
    step = _until_unseen(problem, opt, unseen)
    for extra in range(20):
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        twin = problem.twin()
        other = build(twin, **overrides)
        other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
        again = copy.deepcopy((problem, opt))
        unseen.clear()
        first = train(*again, 40, start=step + extra)
        seen = list(unseen)
        unseen.clear()
        assert first == train(twin, other, 40, start=step + extra)
        assert unseen == seen
        assert_same_bits(again[0].weights(), twin.weights())
        train(problem, opt, 1, start=step + extra)
    pickle.loads(pickle.dumps(opt))


def test_broken_rows_in_a_checkpoint_are_refused():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 12)
    state = opt.run.state_dict()
    state["unseen"] = {"rows": [99]}
    with pytest.raises(IndexError):
        opt.run.unseen.load_state_dict(state["unseen"], opt.run.space.parameters())
    with pytest.raises(CheckpointError, match="hybrid state"):
        _fill(_build(problem.twin()).run, state)


def test_a_parameter_that_wakes_up_is_measured_first(unseen):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    opt = HybridPredictOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
        components=Components(skips_on=("cpu",)),
        predictor=Prior(),
        warmup_steps=2,
        **QUIET,
    )

    def loss(both):
        x = torch.randn(8, 4)
        out = model[0](x) + (model[1](x) if both else 0.0)
        return out.square().mean()

    for _ in range(60):
        opt.step(lambda: loss(False))
    assert len(unseen) > 20
    count, before = len(unseen), model[1].weight.detach().clone()
    # Its first step is no sleeping one: there is no hybrid tensor of it yet.
    opt.step(lambda: loss(True) * math.nan)
    assert len(unseen) == count
    assert torch.equal(before, model[1].weight)
    for _ in range(40):
        opt.step(lambda: loss(True))
    assert len(unseen) > count
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_base_that_does_not_skip_any_more_is_not_left_alone(unseen):
    problem = regression()
    opt = _build(problem, **QUIET)
    step = _until_unseen(problem, opt, unseen, many=2)
    opt.param_groups[0]["fused"] = False
    before, count = problem.weights(), len(unseen)
    opt.step(lambda: problem.loss(step) * math.nan)
    assert len(unseen) == count
    assert_same_bits(before, problem.weights())
    assert opt.last_step.action is RecoveryAction.SKIP_STEP


@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_gradients_that_cannot_be_written_are_measured(kind, unseen):
    problem = regression()
    opt = _build(problem, **QUIET)
    step = _until_unseen(problem, opt, unseen, many=2)
    count, before = len(unseen), problem.weights()
    with torch.inference_mode(kind == "inference"):
        made = [torch.ones(p.shape) for p in problem.model.parameters()]
    for p, gradient in zip(problem.model.parameters(), made, strict=True):
        expanded = torch.ones(()).expand(p.shape)
        p.grad = expanded if kind == "expanded" else gradient
    opt.step()
    assert len(unseen) == count
    assert opt.statistics()["skipped_steps"] == 0
    assert all((a != b).all() for a, b in zip(before, problem.weights(), strict=True))
    train(problem, opt, 8, start=step)
    assert len(unseen) > count


def test_where_every_record_is_wanted_none_passes_unseen(unseen):
    problem = regression()
    opt = _build(problem, collect_metrics=True, **QUIET)
    losses = train(problem, opt, 120)
    assert unseen == []
    train(problem, opt, 1, start=120)
    assert [r.loss for r in opt.run.sink.records[:120]] == losses
