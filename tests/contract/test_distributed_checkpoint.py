"""The state-dict API of torch.distributed.checkpoint, in memory and on disk."""

import copy
import warnings

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import Prior
from hybridopt.weights.space import KEYS
from tests.contract.loops import assert_continues_alike, build, drive, loaded
from tests.problems import BASES, assert_same_bits, regression, train

FORMATS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd_momentum", "adagrad"])
@pytest.mark.parametrize("way", FORMATS)
@pytest.mark.parametrize("position", [0, 1])
def test_distributed_state_dict_resumes_exactly(way, position, name):
    problem = regression()
    opt = build(problem, name)
    steps = drive(problem, opt, Phase.PREDICT, position)
    options = FORMATS[way]
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, opt, options=options))

    def load(twin, other, values):
        set_optimizer_state_dict(twin.model, other, values, options=options)

    twin, other = loaded(problem, opt, state, load, name=name)
    assert_continues_alike(problem, opt, twin, other, steps)


@pytest.mark.parametrize("way", ["plain", "flat"])
def test_distributed_checkpoint_on_disk_resumes_exactly(way, tmp_path):
    problem = regression()
    opt = build(problem)
    steps = drive(problem, opt, Phase.PREDICT, position=1)
    options = FORMATS[way]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that one process saves alone
        saved = get_optimizer_state_dict(problem.model, opt, options=options)
        dcp.save({"opt": saved}, checkpoint_id=tmp_path / "dcp")

        def load(twin, other, path):
            template = get_optimizer_state_dict(twin.model, other, options=options)
            dcp.load({"opt": template}, checkpoint_id=path)
            set_optimizer_state_dict(twin.model, other, template, options=options)

        twin, other = loaded(problem, opt, tmp_path / "dcp", load)
    assert_continues_alike(problem, opt, twin, other, steps)


@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd_momentum"])
def test_zero_step_of_distributed_checkpointing_is_no_training_step(name):
    problem = regression()
    opt = build(problem, name)
    weights = problem.weights()
    for _ in range(3):
        get_optimizer_state_dict(problem.model, opt)
    assert_same_bits(weights, problem.weights())
    assert opt.statistics()["steps"] == 0
    assert opt.statistics()["backward_calls"] == 0
    assert opt.run.controller.real_steps == 0
    assert opt.phase is Phase.WARMUP
    assert all(set(KEYS) <= set(opt.state[p]) for p in problem.model.parameters())


@pytest.mark.parametrize("when", ["predict", "trained"])
def test_zero_step_in_mid_training_changes_nothing(when):
    problem = regression()
    opt = build(problem, "sgd")
    if when == "predict":
        drive(problem, opt, Phase.PREDICT)
    else:
        train(problem, opt, 2)
    opt.zero_grad()
    weights, phase = problem.weights(), opt.phase
    counted = opt.statistics()
    get_optimizer_state_dict(problem.model, opt)
    assert_same_bits(weights, problem.weights())
    assert opt.phase is phase
    assert opt.statistics() == counted


def test_real_step_with_a_rate_of_zero_still_counts():
    """Schedules often begin at exactly zero; zero gradients make it a zero step."""
    problem = regression()
    opt = build(problem)
    opt.param_groups[0]["lr"] = 0.0
    problem.loss(0).backward()
    opt.step()
    assert opt.statistics()["real_steps"] == 1


def test_state_loads_into_an_optimizer_that_never_stepped():
    """accelerate makes this round trip on every optimizer that it is given."""
    problem = regression()
    opt = build(problem)
    opt.load_state_dict(opt.state_dict())
    train(problem, opt, 12)
    reference = regression()
    twin = build(reference)
    train(reference, twin, 12)
    assert_same_bits(reference.weights(), problem.weights())


def test_disabled_wrapper_adds_no_key():
    problem = regression()
    base = BASES["adamw"](list(problem.model.parameters()))
    opt = HybridPredictOptimizer(base, enabled=False, predictor=Prior())
    train(problem, opt, 4)
    bare = BASES["adamw"](list(problem.model.parameters()))
    assert set(opt.state_dict()["param_groups"][0]) == set(
        bare.state_dict()["param_groups"][0]
    )
    assert not any("hybrid" in k for v in opt.state_dict()["state"].values() for k in v)
