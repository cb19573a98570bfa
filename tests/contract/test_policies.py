"""Every horizon policy goes through one suite; enroll a new one in POLICIES."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridopt.config import FixedHorizon, LinUCB
from hybridopt.control.bandit import build_policy
from hybridopt.errors import CheckpointError
from hybridopt.protocols import HorizonPolicy

SIZE = 4
POLICIES: dict[str, Callable[[int], HorizonPolicy]] = {
    "linucb": lambda longest: build_policy(LinUCB(), longest, SIZE),
    "linucb, undiscounted": lambda longest: build_policy(
        LinUCB(discount=1.0, exploration=0.0), longest, SIZE
    ),
    "fixed": lambda longest: build_policy(FixedHorizon(), longest, SIZE),
}


@pytest.fixture(params=POLICIES)
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def live(policy: HorizonPolicy, seed: int, count: int = 60) -> list[int]:
    """Play and learn; the arms that were chosen."""
    rng, arms = random.Random(seed), []
    for _ in range(count):
        context = [1.0, *(rng.gauss(0, 1) for _ in range(SIZE - 1))]
        arm = policy.choose(context, rng.choice([0, 3, 9, 16]))
        policy.update(arm, context, rng.gauss(0, 1) + context[1] * arm)
        arms.append(arm)
    return arms


def test_policy_satisfies_the_protocol(name: str) -> None:
    policy = POLICIES[name](16)
    assert isinstance(policy, HorizonPolicy)
    assert policy.horizons == (0, 1, 2, 3, 4, 6, 8, 12, 16)


@pytest.mark.parametrize("seed", range(3))
@settings(max_examples=25, deadline=None)
@given(longest=st.integers(-5, 40), most=st.integers(0, 33))
def test_policy_never_exceeds_the_longest(seed: int, longest: int, most: int) -> None:
    rng = random.Random(seed)
    for build in POLICIES.values():
        policy = build(most)
        context = [1.0, *(rng.gauss(0, 1) for _ in range(SIZE - 1))]
        for _ in range(4):
            arm = policy.choose(context, longest)
            assert 0 <= arm < len(policy.horizons)
            assert policy.horizons[arm] <= max(longest, 0)
            policy.update(arm, context, rng.gauss(0, 1))


def test_policy_plays_arm_zero_when_nothing_else_is_allowed(name: str) -> None:
    policy = POLICIES[name](16)
    live(policy, 0)
    assert policy.choose([1.0, 5.0, -3.0, 2.0], 0) == 0
    assert POLICIES[name](0).choose([1.0, 0.0, 0.0, 0.0], 16) == 0


def test_policy_repeats_itself(name: str) -> None:
    assert live(POLICIES[name](16), 1) == live(POLICIES[name](16), 1)


def test_policy_untried_prefers_the_longest(name: str) -> None:
    policy = POLICIES[name](16)
    context = [1.0, 0.5, -0.3, 0.2]
    assert policy.horizons[policy.choose(context, 16)] == 16
    assert policy.horizons[policy.choose(context, 7)] == 6


def test_policy_state_continues_exactly(name: str) -> None:
    policy, other = POLICIES[name](16), POLICIES[name](16)
    live(policy, 2)
    other.load_state_dict(copy.deepcopy(policy.state_dict()))
    assert other.state_dict() == policy.state_dict()
    assert live(policy, 3) == live(other, 3)
    assert other.state_dict() == policy.state_dict()


def test_policy_state_is_a_copy(name: str) -> None:
    policy = POLICIES[name](16)
    live(policy, 4)
    state = policy.state_dict()
    before = copy.deepcopy(state)
    live(policy, 5)
    assert state == before


def test_policy_refuses_the_state_of_other_arms(name: str) -> None:
    policy = POLICIES[name](16)
    live(policy, 6)
    before = copy.deepcopy(policy.state_dict())
    for broken in (POLICIES[name](8).state_dict(), {}, None, {**before, "more": 1}):
        with pytest.raises(CheckpointError):
            policy.load_state_dict(broken)  # type: ignore[arg-type]
    assert policy.state_dict() == before
