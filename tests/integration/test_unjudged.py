"""Real steps that wait for nothing keep every promise: forced here on the CPU.

With ``skips_on=("cpu",)`` and a fused base, a real step is taken in by the host one
real step later, as on a GPU.
"""

import copy
import gc
import math
import pickle
import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import (
    RSSM,
    DriftConfig,
    FixedHorizon,
    GainConfig,
    Prior,
    ResidualConfig,
)
from hybridopt.control import controller
from hybridopt.errors import RecoveryAction
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.run import Components
from hybridopt.telemetry.metrics import read_metrics
from tests.kernels.host import COMPILER, host_ops
from tests.parts import FixedPredictor
from tests.problems import assert_same_bits, regression, train, train_bare

FUSED = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-4, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-4, weight_decay=1e-3, fused=True),
    "sgd": lambda p: torch.optim.SGD(
        p, lr=2e-3, momentum=0.9, weight_decay=1e-3, fused=True
    ),
}


SLOW = GainConfig(maximum=16.0, boost=0.0, eager=0.0)
"""Gains that leave time for moves that consume no steps."""


def _build(problem, name="adamw", skips_on=("cpu",), components=None, **overrides):
    parts = components or {}
    return HybridPredictOptimizer(
        FUSED[name](list(problem.model.parameters())),
        model=problem.model,
        components=Components(skips_on=skips_on, **parts),
        **{"predictor": Prior(), "gain": SLOW, "warmup_steps": 6, **overrides},
    )


def _base_state(opt):
    return [
        v.clone()
        for s in opt.base.state.values()
        for k, v in s.items()
        if isinstance(v, torch.Tensor) and not k.startswith("hybrid")
    ]


def _drive(problem, opt, reached, start=0):
    for step in range(start, start + 400):
        if reached(opt):
            return step
        train(problem, opt, 1, start=step)
    raise AssertionError("never came")


def _assert_resumes(problem, opt, step, tmp_path, total=60, **build):
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    twin = problem.twin()
    other = _build(twin, **build)
    other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert other.phase is opt.phase
    assert (other.run.pending is None) == (opt.run.pending is None)
    first, second = (
        train(p, o, total, start=step) for p, o in ((problem, opt), (twin, other))
    )
    assert first == second
    assert_same_bits(problem.weights(), twin.weights())
    assert opt.last_step.loss == other.last_step.loss


# -- saving -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("phase", list(Phase))
def test_resume_in_every_phase_equals_uninterrupted(name, phase, tmp_path):
    problem = regression(batch_norm=True)
    opt = _build(problem, name)
    late = 0 if phase is Phase.WARMUP else 20
    step = _drive(
        problem,
        opt,
        lambda o: o.phase is phase and o.run.counters.steps > late,
    )
    _assert_resumes(problem, opt, step, tmp_path, name=name)


def test_resume_while_a_phase_began_behind_a_step_still_on_its_way(tmp_path):
    problem = regression()
    build = {"max_predict_steps": 3, "bandit": FixedHorizon()}
    parts = [{"predictor": FixedPredictor(0.5, 50.0)} for _ in range(2)]
    opt = _build(problem, components=parts[0], **build)
    step = _drive(
        problem,
        opt,
        lambda o: (
            o.phase is Phase.PREDICT
            and o.run.pending is not None
            and o.run.controller.plan.position > 0
        ),
    )
    _assert_resumes(problem, opt, step, tmp_path, components=parts[1], **build)


@pytest.mark.parametrize(
    "overrides",
    [
        {"predictor": RSSM()},
        {"predictor": RSSM(), "residual": ResidualConfig(enabled=True, rank=2)},
        {"validation_interval": 1},
        {"memory": "low"},
        {"drift": DriftConfig(window_steps=5)},
    ],
    ids=["rssm", "residual", "validation", "low-memory", "drift"],
)
@pytest.mark.parametrize("steps", [33, 90])
def test_resume_with_other_parts_equals_uninterrupted(overrides, steps, tmp_path):
    problem = regression()
    opt = _build(problem, **overrides)
    train(problem, opt, steps)
    _assert_resumes(problem, opt, steps, tmp_path, **overrides)


def test_copies_continue_like_the_original():
    problem = regression()
    opt = _build(problem, max_predict_steps=0)
    train(problem, opt, 41)
    assert opt.run.pending is not None
    whole = {"model": problem.model, "opt": opt}
    copies = copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))
    train(problem, opt, 20, start=41)
    for copied in copies:
        twin = problem.twin()
        twin.model = copied["model"]
        train(twin, copied["opt"], 20, start=41)
        assert_same_bits(problem.weights(), twin.weights())


def test_checkpoint_goes_on_where_steps_are_judged_at_once(tmp_path):
    problem = regression()
    opt = _build(problem, max_predict_steps=0)
    train(problem, opt, 41)
    twin = problem.twin()
    other = _build(twin, skips_on=(), max_predict_steps=0)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    seen = other.run.controller.real_steps
    train(twin, other, 1, start=41)
    assert other.run.pending is None
    assert other.run.controller.real_steps == seen + 2


# -- what must never happen -----------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("when", [0, 1, 3, 6, 7, 15, 24, 31, 45])
def test_bad_step_at_any_time_changes_nothing_but_counts(name, kind, when):
    problem = regression()
    opt = _build(problem, name, max_predict_steps=0)
    for i in range(50):
        bad = i == when
        weight = next(problem.model.parameters())
        handle = (
            weight.register_hook(lambda g: g * math.inf)
            if bad and kind == "gradient"
            else None
        )
        factor = math.nan if bad and kind == "loss" else 1.0
        before, state = problem.weights(), _base_state(opt)
        opt.step(lambda i=i, f=factor: problem.loss(i) * f)
        if handle is not None:
            handle.remove()
        assert all(bool(t.isfinite().all()) for t in (*problem.weights(),))
        assert all(bool(t.isfinite().all()) for t in _base_state(opt))
        if bad:
            assert_same_bits(before, problem.weights())
            if i:
                assert_same_bits(state, _base_state(opt))
            record = opt.last_step
            assert record.action is RecoveryAction.SKIP_STEP
    statistics = opt.statistics()
    assert statistics["skipped_steps"] == 1
    assert statistics["real_steps"] == 49


@given(
    seed=st.integers(0, 10_000),
    faults=st.dictionaries(
        st.integers(1, 80),
        st.sampled_from(["nan_loss", "inf_loss", "nan_grad", "huge_loss"]),
        min_size=1,
        max_size=5,
    ),
    name=st.sampled_from(sorted(FUSED)),
    memory=st.sampled_from(["default", "low"]),
)
@settings(max_examples=40, deadline=None)
def test_rollback_is_bit_exact_whatever_happens(seed, faults, name, memory):
    problem = regression(seed, batches=64, batch_norm=True)
    opt = _build(
        problem,
        name,
        components={"predictor": FixedPredictor(0.5, 50.0)},
        max_predict_steps=3,
        bandit=FixedHorizon(),
        memory=memory,
    )
    for i in range(90):
        kind = faults.get(i)

        def closure(i=i, kind=kind):
            loss = problem.loss(i)
            factors = {"nan_loss": math.nan, "inf_loss": math.inf, "huge_loss": 1e6}
            return loss * factors.get(kind, 1.0)

        handles = []
        if kind == "nan_grad":
            weight = next(problem.model.parameters())
            handles.append(weight.register_hook(lambda g: g * math.nan))
        state = _base_state(opt)
        buffers = [b.clone() for b in opt.run.buffers]
        anchor = [
            opt.base.state[p]["hybrid_anchor"].clone()
            for p in problem.model.parameters()
            if p in opt.base.state
        ]
        moved = opt.run.space.moved
        opt.step(closure)
        for handle in handles:
            handle.remove()
        if opt.run.pending is None and opt.last_step.action in (
            RecoveryAction.ROLL_BACK,
            RecoveryAction.SKIP_STEP,
        ):
            assert_same_bits(state, _base_state(opt))
            if opt.last_step.action is RecoveryAction.ROLL_BACK and moved:
                assert_same_bits(anchor, problem.weights())
                assert_same_bits(buffers, [*problem.model.buffers()])
        assert all(bool(t.isfinite().all()) for t in problem.weights())
        assert all(bool(t.isfinite().all()) for t in _base_state(opt))
    assert opt.statistics()["steps"] == 90


def test_move_behind_a_skipped_step_moves_nothing_and_is_not_measured():
    problem = regression()
    parts = {"predictor": FixedPredictor(0.5, 50.0)}
    opt = _build(problem, components=parts, max_predict_steps=0)
    train(problem, opt, 20)
    assert opt.run.controller.move is not None
    before = problem.weights()
    opt.step(lambda: problem.loss(20) * math.nan)
    assert opt.run.controller.move is not None  # the host does not know yet
    assert_same_bits(before, problem.weights())
    train(problem, opt, 1, start=21)
    assert opt.run.pending.move is None
    train(problem, opt, 2, start=22)
    assert opt.run.pending.move is not None


def test_run_that_ends_in_warmup_equals_bare_base_bit_for_bit():
    bare, wrapped = regression(), regression()
    train_bare(bare, FUSED["adamw"](list(bare.model.parameters())), 40)
    opt = _build(wrapped, warmup_steps=41)
    train(wrapped, opt, 40)
    assert opt.run.pending is not None
    assert_same_bits(bare.weights(), wrapped.weights())


def test_prediction_off_equals_bare_base_bit_for_bit():
    bare, wrapped = regression(), regression()
    train_bare(bare, FUSED["adamw"](list(bare.model.parameters())), 60)
    train(wrapped, _build(wrapped, enabled=False), 60)
    assert_same_bits(bare.weights(), wrapped.weights())


@pytest.mark.parametrize("steps", [30, 41, 120])
def test_train_off_continues_as_the_bare_base(steps):
    wrapped = regression()
    opt = _build(wrapped)
    train(wrapped, opt, steps)
    opt.train_off()
    assert opt.run.pending is None
    bare = wrapped.twin()
    base = FUSED["adamw"](list(bare.model.parameters()))
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(wrapped, opt, 20, start=steps)
    for i in range(steps, steps + 20):
        base.zero_grad()
        bare.loss(i).backward()
        base.step()
    assert_same_bits(bare.weights(), wrapped.weights())


def test_user_rng_is_untouched():
    problem = regression()
    opt = _build(problem)
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    train(problem, opt, 150)
    assert opt.statistics()["predicted_steps"] > 0
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


# -- the same, one step later ---------------------------------------------------------


class _Listener(FixedPredictor):
    """Keeps what it observes."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.0)
        self.seen: list = []

    def observe(self, observation):
        super().observe(observation)
        self.seen.append(observation)


def test_what_is_observed_is_what_a_judged_step_would_have_observed(monkeypatch):
    monkeypatch.setattr(controller, "IDLE_STEPS", 100)  # it stays awake
    heard = []
    for skips_on in (("cpu",), ()):
        problem = regression()
        listener = _Listener()
        parts = {"predictor": listener}
        opt = _build(problem, skips_on=skips_on, components=parts, max_predict_steps=0)
        train(problem, opt, 32)
        heard.append(listener.seen)
    late, now = heard
    assert len(late) == len(now) - 1 > 25
    for ours, theirs in zip(late, now, strict=False):
        assert ours.step == theirs.step
        assert ours.loss == theirs.loss
        assert ours.lr_ratio == theirs.lr_ratio
        for name in ("gradient_sq", "dots", "basis_sq", "slopes"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_moves_are_measured_along_the_displacement_that_they_went_along():
    problem = regression()
    listener = _Listener()
    listener.gain = listener.progress = 0.5
    opt = _build(problem, components={"predictor": listener}, max_predict_steps=0)
    steps = []
    for i in range(40):
        opt.step(lambda i=i: problem.loss(i))
        states = [opt.base.state[p] for p in problem.model.parameters()]
        steps.append([s["hybrid_step"].clone() for s in states])
    for observation in listener.seen[10:]:
        assert observation.move is not None
        before = steps[observation.step - 1]
        assert observation.basis_sq[:, 0].tolist() == pytest.approx(
            [float(s.double().square().sum()) for s in before], rel=1e-4
        )


def test_records_have_their_own_numbers_in_order(tmp_path):
    problem = regression()
    path = tmp_path / "metrics.jsonl"
    opt = _build(problem, metrics_path=str(path), collect_metrics=True)
    losses = {}
    for i in range(120):
        value = opt.step(lambda i=i: problem.loss(i))
        losses[i] = float(value)
    opt.close()
    for records in (read_metrics(path), opt.run.sink.records):
        assert [r.step for r in records] == list(range(120))
        for record in records:
            if not record.loss_predicted:
                assert record.loss == losses[record.step]
                assert math.isfinite(record.gradient_norm)
    assert any(r.loss_predicted for r in records)


def test_last_step_has_its_numbers_when_asked():
    problem = regression()
    opt = _build(problem, max_predict_steps=0)
    for i in range(30):
        value = opt.step(lambda i=i: problem.loss(i))
        assert math.isnan(opt.run.last_step.loss) or i == 0
        assert opt.last_step.loss == float(value)
        assert opt.last_step.step == i
    assert opt.run.pending is not None


def test_metrics_of_a_program_that_ends_without_close_miss_no_line(tmp_path):
    problem = regression()
    path = tmp_path / "metrics.jsonl"
    opt = _build(problem, metrics_path=str(path))
    train(problem, opt, 9)
    del opt
    records = read_metrics(path)
    assert [r.step for r in records] == list(range(9))
    assert math.isnan(records[-1].loss)


def test_add_param_group_takes_the_last_step_in_first(tmp_path):
    problem = regression()
    opt = _build(problem, collect_metrics=True)
    train(problem, opt, 20)
    extra = torch.nn.Parameter(torch.zeros(2))
    sink = opt.run.sink
    opt.add_param_group({"params": [extra]})
    assert opt.run.pending is None
    assert [r.step for r in sink.records] == list(range(20))
    assert all(math.isfinite(r.loss) for r in sink.records)


def test_learning_is_about_as_good_one_step_late():
    final = {}
    for skips_on in (("cpu",), ()):
        problem = regression()
        opt = _build(problem, skips_on=skips_on)
        losses = train(problem, opt, 400)
        final[skips_on] = sum(losses[-100:]) / 100
        assert opt.statistics()["predicted_steps"] > 40
    late, now = final.values()
    assert late == pytest.approx(now, rel=0.1)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("drift", [True, False])
def test_moves_made_in_the_pass_of_the_base_step_are_the_same_moves(drift):
    results = []
    for ops in (host_ops(), TorchOps()):
        problem = regression()
        opt = _build(
            problem,
            components={"ops": ops},
            drift=DriftConfig(enabled=drift, window_steps=7),
        )
        losses = train(problem, opt, 80)
        assert opt.statistics()["folded_moves"] > 5
        assert opt.statistics()["predicted_steps"] > 5
        results.append((losses, problem.weights()))
    (ours, weights), (want, others) = results
    assert ours == pytest.approx(want, rel=1e-4)
    for a, b in zip(weights, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_resume_with_fused_passes_equals_uninterrupted(tmp_path):
    problem = regression()
    opt = _build(problem, components={"ops": host_ops()})
    train(problem, opt, 15)
    parts = {"ops": host_ops()}
    _assert_resumes(problem, opt, 15, tmp_path, components=parts)


@pytest.mark.parametrize("phase", list(Phase))
def test_resume_with_low_memory_in_every_phase(phase, tmp_path):
    problem = regression()
    opt = _build(problem, memory="low", validation_interval=2)
    late = 0 if phase is Phase.WARMUP else 20
    step = _drive(
        problem, opt, lambda o: o.phase is phase and o.run.counters.steps > late
    )
    parts = {"memory": "low", "validation_interval": 2}
    _assert_resumes(problem, opt, step, tmp_path, **parts)


def test_graph_of_the_last_loss_does_not_wait_for_the_next_step():
    problem = regression()
    opt = _build(problem, max_predict_steps=0)
    train(problem, opt, 12)
    kept = []

    def closure():
        loss = problem.loss(12)
        kept.append(weakref.ref(loss))
        return loss

    opt.step(closure)
    assert opt.run.pending is not None
    gc.collect()
    assert kept[0]() is None
