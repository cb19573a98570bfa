"""Every way in which frameworks save and load optimizers; no hybrid state is lost."""

import copy

import pytest
import torch

from hybridopt import Phase
from hybridopt.weights.space import KEYS
from tests.contract.loops import assert_continues_alike, build, drive, loaded, wrap
from tests.problems import BASES, assert_same_bits, regression, train

# -- where state sits --------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_state_has_the_bases_structure_and_only_values_that_every_format_carries(name):
    problem, bare = regression(), regression()
    opt = build(problem, name)
    base = BASES[name](list(bare.model.parameters()))
    train(problem, opt, 9)
    state = opt.state_dict()
    assert set(state) == set(base.state_dict()) == {"state", "param_groups"}
    for index, p in enumerate(problem.model.parameters()):
        values = state["state"][index]
        assert set(KEYS) <= set(values)
        for key, value in values.items():
            assert isinstance(value, (torch.Tensor, int, float, bool)), key
        for key in KEYS:
            # Stacked or scalar tensors would not survive FSDP's flattening, and a
            # load casts to the parameter's dtype.
            assert values[key].shape == p.shape
            assert values[key].dtype == p.dtype
    for group in state["param_groups"]:
        assert isinstance(group["hybrid"], str)
        assert group["hybrid"].isascii()


def test_lower_precision_directions_get_their_dtype_back_after_a_load():
    problem = regression()
    opt = build(problem, memory_budget=0.0)
    steps = drive(problem, opt, Phase.PREDICT, position=1)
    first = next(iter(opt.state.values()))
    assert first["hybrid_step"].dtype is torch.bfloat16
    state = copy.deepcopy(opt.state_dict())
    twin, other = loaded(
        problem, opt, state, lambda _, o, s: o.load_state_dict(s), memory_budget=0.0
    )
    assert next(iter(other.state.values()))["hybrid_step"].dtype is torch.bfloat16
    assert_continues_alike(problem, opt, twin, other, steps)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_key_set_is_complete_after_the_first_base_step_and_then_fixed(memory):
    problem = regression()
    opt = build(problem, memory=memory)
    keys = []
    for i in range(12):
        opt.step(lambda i=i: problem.loss(i))
        state = opt.state_dict()
        keys.append(
            (
                [sorted(v) for v in state["state"].values()],
                [sorted(g) for g in state["param_groups"]],
            )
        )
    assert all(k == keys[0] for k in keys)
    assert opt.statistics()["predicted_steps"] > 0


@pytest.mark.parametrize("name", BASES)
def test_no_hybrid_key_and_no_empty_entry_comes_before_the_bases_own_state(name):
    """Bases fill their state where it is empty; an early key makes them fail."""
    problem = regression()
    base = BASES[name](list(problem.model.parameters()))
    own = {p: dict(base.state[p]) for p in base.state}
    opt = wrap(base)
    opt.needs_backward, opt.phase, opt.statistics(), opt.state_dict(), repr(opt)
    assert set(base.state) == set(own)
    for p, values in own.items():
        # Where the base is filled at construction (Adagrad), ours follow at once:
        # nothing else would add them before a checkpoint is loaded.
        assert set(base.state[p]) == set(values) | set(KEYS)
    train(problem, opt, 1)
    assert set(KEYS) <= set(base.state[next(problem.model.parameters())])


def test_parameter_without_gradient_gets_no_entry():
    problem = regression()
    spare = torch.nn.Parameter(torch.ones(2))
    opt = wrap(torch.optim.AdamW([*problem.model.parameters(), spare], lr=1e-3))
    train(problem, opt, 12)
    assert spare not in opt.state
    assert opt.statistics()["predicted_steps"] > 0
    assert torch.equal(spare.detach(), torch.ones(2))


# -- through files -----------------------------------------------------------------


@pytest.mark.parametrize("phase", list(Phase))
def test_file_loads_with_weights_only_and_nothing_allow_listed(phase, tmp_path):
    problem = regression()
    opt = build(problem)
    steps = drive(problem, opt, phase) if phase is not Phase.FULL else 0
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint
    assert unsafe(tmp_path / "opt.pt") == []
    state = torch.load(tmp_path / "opt.pt", weights_only=True)
    twin, other = loaded(problem, opt, state, lambda _, o, s: o.load_state_dict(s))
    assert_continues_alike(problem, opt, twin, other, steps)


@pytest.mark.parametrize("name", BASES)
def test_bare_bases_checkpoint_loads_and_starts_in_warmup(name):
    problem = regression()
    base = BASES[name](list(problem.model.parameters()))
    for i in range(6):
        base.zero_grad()
        problem.loss(i).backward()
        base.step()
    twin = problem.twin()
    opt = build(twin, name, warmup_steps=50)
    opt.load_state_dict(copy.deepcopy(base.state_dict()))
    assert opt.phase is Phase.WARMUP
    for i in range(6, 12):
        base.zero_grad()
        problem.loss(i).backward()
        base.step()
    train(twin, opt, 6, start=6)
    assert_same_bits(problem.weights(), twin.weights())


def test_hybrid_checkpoint_loads_into_the_bare_base():
    problem = regression()
    opt = build(problem)
    train(problem, opt, 10)
    bare = BASES["adamw"](list(problem.model.parameters()))
    bare.load_state_dict(copy.deepcopy(opt.state_dict()))
    problem.loss(0).backward()
    bare.step()
    assert set(bare.state_dict()) == {"state", "param_groups"}


@pytest.mark.parametrize("kind", ["bare", "hybrid"])
def test_load_leaves_its_argument_unmodified(kind):
    problem = regression()
    opt = build(problem)
    train(problem, opt, 8)
    source = (
        opt if kind == "hybrid" else BASES["adamw"](list(problem.model.parameters()))
    )
    state = copy.deepcopy(source.state_dict())
    kept = copy.deepcopy(state)
    other = build(problem.twin())
    other.load_state_dict(state)
    assert state["param_groups"] == kept["param_groups"]
    assert list(state["state"]) == list(kept["state"])
    for index, values in kept["state"].items():
        assert list(values) == list(state["state"][index])
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), state["state"][index][key])


def test_saving_and_loading_go_through_a_base_that_overrides_them():
    problem = regression()

    class Refuses(torch.optim.AdamW):
        loads = 0

        def state_dict(self):
            if not self.loads:
                raise RuntimeError("not consolidated")
            return super().state_dict()

        def load_state_dict(self, state_dict):
            type(self).loads += 1
            super().load_state_dict(state_dict)

    opt = wrap(Refuses(problem.model.parameters(), lr=1e-3))
    train(problem, opt, 4)
    with pytest.raises(RuntimeError, match="not consolidated"):
        opt.state_dict()
    opt.load_state_dict(build(regression()).state_dict())
    assert Refuses.loads == 1
    assert opt.state_dict()["param_groups"]
