"""Save, load and continue equals the uninterrupted run, bit for bit, in every phase."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.codec import VERSION
from hybridopt.config import MLP, RSSM, Linear, Prior
from hybridopt.errors import CheckpointError
from tests.problems import BASES, assert_same_bits, regression, train

PREDICTORS = {"prior": Prior(), "linear": Linear(), "mlp": MLP(), "rssm": RSSM()}
QUICK = {"warmup_steps": 6}


def _build(problem, name="adamw", **overrides):
    base = BASES[name](list(problem.model.parameters()))
    return HybridPredictOptimizer(
        base, model=problem.model, **{"predictor": Prior(), **QUICK, **overrides}
    )


def _through_disk(opt, path):
    torch.save(opt.state_dict(), path)
    return torch.load(path, weights_only=True)


def _continue_from(problem, opt, steps, total, tmp_path, **build):
    """Save after ``steps``, load into fresh objects, run both to ``total``."""
    state = _through_disk(opt, tmp_path / "opt.pt")
    model_state = copy.deepcopy(problem.model.state_dict())
    twin = problem.twin()
    twin.model.load_state_dict(model_state)
    other = _build(twin, **build)
    other.load_state_dict(state)
    assert other.phase is opt.phase
    first = train(problem, opt, total - steps, start=steps)
    second = train(twin, other, total - steps, start=steps)
    assert first == second
    assert_same_bits(problem.weights(), twin.weights())
    return twin, other


@pytest.mark.parametrize("phase", list(Phase))
def test_resume_in_every_phase_equals_uninterrupted(phase, tmp_path):
    problem = regression()
    opt = _build(problem, "adamw_slow")
    for step in range(200):
        if opt.phase is phase and (phase is Phase.WARMUP or step > 8):
            break
        train(problem, opt, 1, start=step)
    assert opt.phase is phase
    _continue_from(problem, opt, step, step + 60, tmp_path, name="adamw_slow")


def test_resume_in_the_middle_of_predict_equals_uninterrupted(tmp_path):
    problem = regression()
    opt = _build(problem, "adamw_slow")
    step = 0
    while (
        not 0 < opt.run.controller.plan.position < opt.run.controller.plan.horizon - 1
    ):
        train(problem, opt, 1, start=step)
        step += 1
        assert step < 300
    _continue_from(problem, opt, step, step + 60, tmp_path, name="adamw_slow")


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("steps", [30, 77])
def test_resume_with_every_predictor_equals_uninterrupted(name, steps, tmp_path):
    problem = regression()
    opt = _build(problem, predictor=PREDICTORS[name])
    train(problem, opt, steps)
    _continue_from(
        problem, opt, steps, steps + 80, tmp_path, predictor=PREDICTORS[name]
    )


@pytest.mark.parametrize("name", [n for n in BASES if n != "adafactor"])
def test_resume_with_every_base_equals_uninterrupted(name, tmp_path):
    problem = regression()
    opt = _build(problem, name)
    train(problem, opt, 45)
    _continue_from(problem, opt, 45, 100, tmp_path, name=name)


def test_resume_with_batch_norm_and_secant_moves(tmp_path):
    problem = regression(batches=1, noise=0.0)
    opt = _build(problem, "adam")
    train(problem, opt, 60)
    assert opt.statistics()["secant_moves"] > 0
    _continue_from(problem, opt, 60, 120, tmp_path, name="adam")


def test_deepcopy_and_pickle_continue_like_the_original():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 37)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
    assert "step" in opt.__dict__, "the scheduler patches the instance"
    for copied in (
        copy.deepcopy({"model": problem.model, "opt": opt}),
        pickle.loads(pickle.dumps({"model": problem.model, "opt": opt})),
    ):
        twin = problem.twin()
        twin.model = copied["model"]
        before = problem.weights()
        train(twin, copied["opt"], 10, start=37)
        assert_same_bits(before, problem.weights())
        original = copy.deepcopy({"model": problem.model, "opt": opt})
        again = problem.twin()
        again.model = original["model"]
        train(again, original["opt"], 10, start=37)
        assert_same_bits(again.weights(), twin.weights())
    assert scheduler.get_last_lr() == [3e-3]


def test_bare_checkpoint_starts_in_warmup():
    problem = regression()
    base = BASES["adamw"](list(problem.model.parameters()))
    for i in range(5):
        base.zero_grad()
        problem.loss(i).backward()
        base.step()
    saved = copy.deepcopy(base.state_dict())
    kept = copy.deepcopy(saved)
    twin = problem.twin()
    opt = _build(twin)
    opt.load_state_dict(saved)
    assert opt.phase is Phase.WARMUP
    assert saved["param_groups"] == kept["param_groups"]
    for key, entry in kept["state"].items():
        assert_same_bits(list(entry.values()), list(saved["state"][key].values()))
    train(twin, opt, 40)
    assert opt.statistics()["steps"] == 40


def test_checkpoint_of_a_never_stepped_optimizer_loads():
    problem = regression()
    opt = _build(problem)
    other = _build(problem.twin())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.phase is Phase.WARMUP


def _damage(text, kind):
    match kind:
        case "truncated":
            return text[: len(text) // 2]
        case "flipped":
            middle = len(text) // 2
            flipped = "A" if text[middle] != "A" else "B"
            return text[:middle] + flipped + text[middle + 1 :]
        case "version":
            return text.replace(f"hybridopt:{VERSION}:", "hybridopt:999:", 1)
        case _:
            return "nonsense"


@pytest.mark.parametrize("kind", ["truncated", "flipped", "version", "nonsense"])
def test_damaged_checkpoint_fails_cleanly_and_changes_nothing(kind):
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 30)
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group["hybrid"] = _damage(group["hybrid"], kind)
    weights = problem.weights()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(CheckpointError):
        opt.load_state_dict(state)
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key in before["state"]:
        assert_same_bits(
            [v for v in before["state"][key].values() if isinstance(v, torch.Tensor)],
            [v for v in after["state"][key].values() if isinstance(v, torch.Tensor)],
        )
    assert_same_bits(weights, problem.weights())


def test_checkpoint_of_another_model_fails_cleanly():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 30)
    other_model = nn.Linear(2, 2, bias=False)
    other = HybridPredictOptimizer(torch.optim.AdamW(other_model.parameters()))
    before = [p.detach().clone() for p in other_model.parameters()]
    with pytest.raises(CheckpointError, match="parameter tensors"):
        other.load_state_dict(opt.state_dict())
    assert_same_bits(before, [p.detach().clone() for p in other_model.parameters()])
    assert other.phase is Phase.WARMUP


def test_state_dict_holds_only_what_every_checkpoint_format_carries():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 30)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    for entry in state["state"].values():
        for value in entry.values():
            assert isinstance(value, (torch.Tensor, int, float, bool))
    for group in state["param_groups"]:
        assert isinstance(group["hybrid"], str)


def test_hybrid_keys_are_a_fixed_set_from_the_first_base_step():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 1)
    first = {frozenset(s) for s in opt.state.values()}
    train(problem, opt, 80, start=1)
    assert {frozenset(s) for s in opt.state.values()} == first
    assert {"hybrid_anchor", "hybrid_step", "hybrid_lag"} <= next(iter(first))


def test_rng_state_travels_only_inside_hybridopt():
    problem = regression()
    opt = _build(problem, predictor=RSSM())
    train(problem, opt, 60)
    before = torch.get_rng_state()
    other = _build(problem.twin(), predictor=RSSM())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(before, torch.get_rng_state())


def test_refused_move_is_still_known_after_a_resume():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 30)
    for refused in (True, False):
        opt.run.refused = refused
        other = _build(problem.twin())
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert other.run.refused is refused


def test_state_from_before_pending_steps_existed_loads():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 30)
    state = copy.deepcopy(opt.run.state_dict())
    del state["refused"], state["pending"]
    other = _build(problem.twin())
    other.run.load_state_dict(state)
    assert other.run.counters.steps == 30
    assert other.run.pending is None
