"""What torch and the frameworks on it demand of an optimizer; one rule per test."""

import copy
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.hooks import plain_step
from tests.contract.loops import WARMUP_STEPS, backward, build, drive, wrap
from tests.problems import BASES, assert_same_bits, regression, train, train_bare

# -- identity and structure --------------------------------------------------------


def test_containers_are_the_bases_own_even_after_a_load_replaced_them():
    problem = regression()
    opt = build(problem)
    train(problem, opt, 5)
    state = copy.deepcopy(opt.state_dict())
    groups = opt.base.param_groups
    opt.base.load_state_dict(state)
    assert opt.base.param_groups is not groups
    for name in ("param_groups", "state", "defaults"):
        assert getattr(opt, name) is getattr(opt.base, name)
    opt.param_groups[0]["lr"] = 0.125
    assert opt.base.param_groups[0]["lr"] == 0.125
    fresh = {"a": 1}
    opt.defaults = fresh
    assert opt.base.defaults is fresh


@pytest.mark.parametrize("name", BASES)
def test_wrapping_a_trained_base_keeps_its_state(name):
    bare, problem = regression(), regression()
    reference = BASES[name](list(bare.model.parameters()))
    train_bare(bare, reference, 12)
    base = BASES[name](list(problem.model.parameters()))
    train_bare(problem, base, 6)
    opt = wrap(base, warmup_steps=100)
    train(problem, opt, 6, start=6)
    assert_same_bits(bare.weights(), problem.weights())


def test_parameters_swapped_inside_groups_are_followed():
    """Frameworks replace tensors in existing groups after the optimizer is built."""
    problem = regression()
    opt = build(problem)
    for module in problem.model:
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(p.detach().clone()))
    opt.param_groups[0]["params"] = list(problem.model.parameters())
    reference = regression()
    twin = build(reference)
    train(problem, opt, 20)
    train(reference, twin, 20)
    assert_same_bits(reference.weights(), problem.weights())
    assert opt.statistics()["predicted_steps"] > 0
    assert set(opt.state) == set(problem.model.parameters())


def test_step_is_a_plain_method_that_can_be_replaced_on_the_instance():
    problem = regression()
    opt = build(problem)
    assert inspect.isfunction(HybridPredictOptimizer.step)
    assert weakref.ref(opt)() is opt
    assert opt.step.__func__ is not None
    calls, original = [], opt.step

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    opt.step = counted
    train(problem, opt, 2)
    assert len(calls) == 2
    assert opt.statistics()["steps"] == 2


def test_closure_is_an_optional_parameter_called_closure():
    problem = regression()
    opt = build(problem)
    parameter = inspect.signature(opt.step).parameters["closure"]
    assert parameter.default is None
    assert float(opt.step(closure=lambda: problem.loss(0))) > 0
    backward(problem, opt, 1)
    assert opt.step(closure=None) is None
    assert opt.statistics()["real_steps"] == 2


def test_zero_grad_and_repr_act_on_the_bases_groups():
    problem = regression()
    opt = build(problem)
    train(problem, opt, 2)
    problem.loss(0).backward()
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in problem.model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in problem.model.parameters())
    opt.state_dict()
    assert "AdamW" in repr(opt)
    assert "lr: 0.003" in repr(opt)
    assert len(repr(opt)) < 1000  # the encoded state is not shown


def test_group_added_in_mid_training_gets_every_hybrid_key():
    problem = regression()
    opt = build(problem)
    drive(problem, opt, Phase.PREDICT, position=1)
    extra = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [extra], "lr": 0.5})
    assert opt.base.param_groups[1]["params"] == [extra]
    assert extra not in opt.state  # the base has not filled it yet
    for i in range(WARMUP_STEPS + 4):
        opt.step(lambda i=i: problem.loss(i) + (extra**2).sum())
    assert {"hybrid_anchor", "hybrid_step", "hybrid_lag"} <= set(opt.state[extra])
    assert all("hybrid" in g for g in opt.state_dict()["param_groups"])
    assert float(extra.detach().abs().max()) < 1.0
    assert opt.statistics()["predicted_steps"] > 0


def proxy_of(opt):
    """What Lightning and Fabric make: a dynamic subclass with a copied ``__dict__``."""
    proxy = object.__new__(type("Proxy", (type(opt),), {}))
    proxy.__dict__.update(opt.__dict__)
    return proxy


def test_methods_run_on_a_proxy_change_the_original():
    problem = regression()
    opt = build(problem)
    proxy = proxy_of(opt)
    train(problem, proxy, 12)
    assert opt.statistics()["steps"] == 12
    assert opt.phase is proxy.phase
    state = copy.deepcopy(proxy.state_dict())
    train(problem, proxy, 3, start=12)
    proxy.load_state_dict(state)
    assert opt.statistics()["steps"] == proxy.statistics()["steps"] == 12
    proxy.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.phase is proxy.phase is Phase.WARMUP
    proxy.train_off()
    assert not opt.run.enabled


def test_there_is_no_train_or_eval_method():
    """Frameworks call them every step and mean schedule-free weights by it."""
    opt = build(regression())
    assert not hasattr(opt, "train")
    assert not hasattr(opt, "eval")


# -- hooks -------------------------------------------------------------------------


def test_all_six_hooks_fire_once_per_call_with_the_wrapper_as_self():
    problem = regression()
    opt = build(problem)
    seen = []
    note = lambda name: lambda self, *_: seen.append((name, self))  # noqa: E731
    opt.register_step_pre_hook(note("step_pre"))
    opt.register_step_post_hook(note("step_post"))
    opt.register_state_dict_pre_hook(note("save_pre"))
    opt.register_state_dict_post_hook(note("save_post"))
    opt.register_load_state_dict_pre_hook(note("load_pre"))
    opt.register_load_state_dict_post_hook(note("load_post"))
    on_base = []
    opt.base.register_step_post_hook(lambda *_: on_base.append(1))
    train(problem, opt, 12)
    assert opt.statistics()["predicted_steps"] > 0
    assert [name for name, _ in seen] == ["step_pre", "step_post"] * 12
    assert len(on_base) == opt.statistics()["real_steps"] < 12
    seen.clear()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [n for n, _ in seen] == ["save_pre", "save_post", "load_pre", "load_post"]
    assert all(who is opt for _, who in seen)


def test_what_hooks_return_is_used():
    problem = regression()
    opt = build(problem)
    expected = float(problem.loss(5).detach())
    opt.register_step_pre_hook(lambda o, *_: ((o, lambda: problem.loss(5)), {}))
    assert float(opt.step()) == expected
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    assert opt.state_dict()["note"] == 1
    other = build(regression())
    saved = opt.state_dict()
    other.register_load_state_dict_pre_hook(lambda *_: saved)
    other.load_state_dict({"state": {}, "param_groups": []})
    assert other.statistics()["steps"] == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_global_hooks_see_the_wrapper_once_per_step(enabled):
    problem = regression()
    opt = build(problem, enabled=enabled)
    seen = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(
            lambda o, *_: seen.append(("pre", o))
        ),
        torch_optimizer.register_optimizer_step_post_hook(
            lambda o, *_: seen.append(("post", o))
        ),
    ]
    try:
        train(problem, opt, 12)
        backward(problem, opt, 0)
        opt.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("pre", opt), ("post", opt)] * 13
    assert not torch_optimizer._global_optimizer_post_hooks


def test_whoever_listens_to_the_base_hears_its_steps():
    problem = regression()
    opt = build(problem)
    with torch.profiler.profile() as profile:
        opt.step(lambda: problem.loss(0))
    names = [event.key for event in profile.key_averages()]
    for kind in (HybridPredictOptimizer, type(opt.base)):
        assert f"Optimizer.step#{kind.__name__}.step" in names
    assert plain_step(opt.base) != opt.base.step
    # What was put on the instance is what is called.
    calls = []
    original = opt.base.step
    opt.base.step = lambda *a: calls.append(1) or original(*a)
    opt.step(lambda: problem.loss(1))
    assert calls == [1]
    del opt.base.step
    handle = opt.base.register_step_pre_hook(lambda *_: calls.append(2))
    opt.step(lambda: problem.loss(2))
    assert calls == [1, 2]
    handle.remove()
    assert plain_step(opt.base) != opt.base.step


def test_hook_of_another_kind_registered_inside_a_step_survives():
    problem = regression()
    opt = build(problem)
    kept = torch_optimizer.register_optimizer_step_post_hook(lambda *_: None)
    added = []

    def register(*_):
        if not added:
            added.append(
                torch_optimizer.register_optimizer_step_post_hook(lambda *_: None)
            )

    opt.base.register_step_pre_hook(register)
    try:
        train(problem, opt, 1)
        assert len(torch_optimizer._global_optimizer_post_hooks) == 2
    finally:
        for handle in [kept, *added]:
            handle.remove()


# -- copies ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copy_made_beside_a_scheduler_is_complete_and_moves_only_itself(way):
    problem = regression()
    opt = build(problem)
    torch.optim.lr_scheduler.StepLR(opt, 100)
    drive(problem, opt, Phase.PREDICT, position=1)
    if way == "deepcopy":
        memo: dict = {}
        model = copy.deepcopy(problem.model, memo)
        clone = copy.deepcopy(opt, memo)
    else:
        model, clone = pickle.loads(pickle.dumps((problem.model, opt)))
    assert isinstance(clone, HybridPredictOptimizer)
    weights = problem.weights()
    other = problem.twin()
    other.model = model
    losses = train(other, clone, 20, start=50)
    assert_same_bits(weights, problem.weights())
    assert train(problem, opt, 20, start=50) == losses
    assert_same_bits(problem.weights(), other.weights())


def test_base_repairs_old_checkpoints_through_its_setstate():
    """Adam, for one, turned its step counter from a number into a tensor."""
    problem = regression()
    opt = build(problem, "adam")
    train(problem, opt, 5)
    state = copy.deepcopy(opt.state_dict())
    for values in state["state"].values():
        values["step"] = int(values["step"])
    for group in state["param_groups"]:
        del group["maximize"]
    opt.load_state_dict(state)
    assert all(isinstance(s["step"], torch.Tensor) for s in opt.state.values())
    assert opt.param_groups[0]["maximize"] is False
    train(problem, opt, 5)
    called = []
    opt.base.__class__ = type(
        "Spy",
        (type(opt.base),),
        {"__setstate__": lambda self, state: called.append(set(state))},
    )
    opt.__setstate__({"state": {}, "param_groups": []})
    assert called == [{"state", "param_groups"}]
    assert isinstance(opt.base, Optimizer)


# -- around other wrappers ---------------------------------------------------------


def test_consolidation_is_forwarded_to_a_base_that_has_it():
    problem = regression()
    opt = build(problem)
    before = repr(opt.state_dict())
    opt.consolidate_state_dict()  # Lightning calls it whatever the base is
    assert repr(opt.state_dict()) == before
    asked = []
    opt.base.consolidate_state_dict = lambda to=0: asked.append(to)
    opt.consolidate_state_dict(to=3)
    assert asked == [3]
