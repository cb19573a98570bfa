from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from hybridopt.config import FixedHorizon, LinUCB
from hybridopt.control.bandit import (
    FixedHorizonPolicy,
    LinUCBPolicy,
    build_horizons,
    build_policy,
)
from hybridopt.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (0, (0,)),
        (1, (0, 1)),
        (2, (0, 1, 2)),
        (5, (0, 1, 2, 3, 4, 5)),
        (16, (0, 1, 2, 3, 4, 6, 8, 12, 16)),
        (17, (0, 1, 2, 3, 4, 6, 8, 12, 16, 17)),
    ],
)
def test_build_horizons_has_two_arms_per_octave_up_to_the_longest(
    longest: int, expected: tuple[int, ...]
) -> None:
    assert build_horizons(longest) == expected


def test_build_policy_follows_the_configuration() -> None:
    assert isinstance(build_policy(LinUCB(), 4, 2), LinUCBPolicy)
    assert isinstance(build_policy(FixedHorizon(), 4, 2), FixedHorizonPolicy)


def test_fixed_horizon_takes_the_longest_allowed_whatever_it_earned() -> None:
    policy = FixedHorizonPolicy((0, 1, 2, 4))
    for _ in range(20):
        policy.update(3, [1.0], -100.0)
    assert [policy.choose([1.0], n) for n in (-1, 0, 1, 3, 4, 99)] == [0, 0, 1, 2, 3, 3]


# -- learning --------------------------------------------------------------------------


def test_linucb_settles_on_not_predicting_when_prediction_does_not_pay() -> None:
    policy, rng = LinUCBPolicy(LinUCB(), (0, 1, 2, 4, 8, 16), 3), random.Random(0)
    late = []
    for step in range(400):
        context = [1.0, rng.random(), rng.gauss(0, 0.3)]
        arm = policy.choose(context, 16)
        policy.update(arm, context, 0.5 - 0.1 * arm + 0.05 * rng.gauss(0, 1))
        if step >= 300:
            late.append(arm)
    assert late.count(0) >= 95


def play(
    policy: LinUCBPolicy, theta: torch.Tensor, steps: int, seed: int
) -> list[float]:
    """Regret per step on a linear problem with a new random context each time."""
    rng, regrets = random.Random(seed), []
    for _ in range(steps):
        context = [1.0, *(rng.uniform(-1, 1) for _ in range(theta.shape[1] - 1))]
        means = (theta @ torch.tensor(context, dtype=torch.float64)).tolist()
        arm = policy.choose(context, 100)
        policy.update(arm, context, means[arm] + 0.1 * rng.gauss(0, 1))
        regrets.append(max(means) - means[arm])
    return regrets


def test_linucb_regret_grows_ever_more_slowly() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    policy = LinUCBPolicy(LinUCB(discount=1.0), (0, 1, 2, 4, 8), 4)
    regrets = play(policy, theta, 2000, 1)
    first, last = sum(regrets[:200]), sum(regrets[-200:])
    rng = random.Random(1)
    blind = 0.0
    for _ in range(200):
        context = [1.0, *(rng.uniform(-1, 1) for _ in range(3))]
        means = (theta @ torch.tensor(context, dtype=torch.float64)).tolist()
        blind += max(means) - sum(means) / len(means)
    assert last < 0.1 * first
    assert last < 0.01 * blind


@pytest.mark.parametrize("discount", [0.95, 0.99])
def test_linucb_follows_a_switch_that_an_undiscounted_one_is_slow_to_see(
    discount: float,
) -> None:
    def late_hits(gamma: float) -> int:
        policy, rng = (
            LinUCBPolicy(LinUCB(discount=gamma), (0, 1, 2), 1),
            random.Random(2),
        )
        hits = 0
        for step in range(900):
            best = 2 if step < 600 else 1
            arm = policy.choose([1.0], 2)
            reward = (1.0 if arm == best else 0.2) + 0.1 * rng.gauss(0, 1)
            policy.update(arm, [1.0], reward)
            hits += step >= 600 and arm == best
        return hits

    assert late_hits(discount) >= 180
    assert late_hits(1.0) < late_hits(discount)


def test_linucb_prefers_by_context() -> None:
    policy, rng = LinUCBPolicy(LinUCB(), (0, 8), 2), random.Random(3)
    for _ in range(400):
        context = [1.0, rng.choice([-1.0, 1.0])]
        arm = policy.choose(context, 8)
        policy.update(arm, context, context[1] * (1.0 if arm == 1 else -1.0))
    assert policy.choose([1.0, 1.0], 8) == 1
    assert policy.choose([1.0, -1.0], 8) == 0


# -- numbers ---------------------------------------------------------------------------


def check_conditioning(updates: int) -> None:
    config = LinUCB(discount=0.99, ridge=0.5)
    policy, rng = LinUCBPolicy(config, (0,), 6), random.Random(4)
    direction = [rng.gauss(0, 1) for _ in range(6)]
    for _ in range(updates):
        # Nearly always the same context: the hard case, since A is starved elsewhere.
        context = [d + 1e-6 * rng.gauss(0, 1) for d in direction]
        policy.update(0, context, 1.0)
    A = torch.tensor(policy.state_dict()["A"][0], dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(A)
    length = sum(d * d for d in direction)
    assert torch.equal(A, A.mT)
    assert float(eigenvalues[0]) >= config.ridge * (1 - 1e-9)
    assert float(eigenvalues[-1]) <= (config.ridge + length / 0.01) * (1 + 1e-6)
    (score,) = policy.scores(direction)
    # 100 |x|^2 against a ridge of 0.5: shrunk by a part in thousands.
    assert score == pytest.approx(1.0 + 0.5 * math.sqrt(0.01), abs=5e-3)


def test_linucb_stays_well_conditioned() -> None:
    check_conditioning(3000)


@pytest.mark.slow
def test_linucb_stays_well_conditioned_for_a_hundred_thousand_updates() -> None:
    check_conditioning(100_000)


def test_linucb_breaks_exact_ties_towards_the_longest() -> None:
    policy = LinUCBPolicy(LinUCB(), (0, 1, 2, 4), 3)
    context = [1.0, 0.1, 0.7]
    for arm in (1, 2):
        policy.update(arm, context, 0.5)
    for arm in (0, 3):
        policy.update(arm, context, -5.0)
    assert policy.choose(context, 4) == 2
    assert policy.choose(context, 1) == 1


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_linucb_leaves_out_rewards_that_are_not_finite(reward: float) -> None:
    policy = LinUCBPolicy(LinUCB(), (0, 1), 2)
    policy.update(1, [1.0, 0.5], 0.3)
    before = copy.deepcopy(policy.state_dict())
    policy.update(1, [1.0, 0.5], reward)
    assert policy.state_dict() == before
    assert policy.pulls == (0, 1)


def test_linucb_survives_absurd_contexts_and_rewards() -> None:
    policy = LinUCBPolicy(LinUCB(), (0, 1), 2)
    for context in ([math.nan, math.inf], [1e300, -1e300], [1e-300, 0.0]):
        policy.update(1, context, 1e300)
        assert all(math.isfinite(s) for s in policy.scores(context))
    assert all(math.isfinite(s) for s in policy.scores([1.0, 1.0]))


def test_linucb_says_which_context_size_it_needs() -> None:
    policy = LinUCBPolicy(LinUCB(), (0, 1), 2)
    with pytest.raises(ConfigError, match=r"context of 3 numbers: must have 2"):
        policy.choose([1.0, 2.0, 3.0], 1)


@pytest.mark.parametrize("horizons", [(), (1, 2), (0, 2, 2), (0, 4, 1)])
def test_policies_refuse_horizons_that_do_not_rise_from_zero(
    horizons: tuple[int, ...],
) -> None:
    with pytest.raises(ConfigError, match="must rise from 0"):
        FixedHorizonPolicy(horizons)
    with pytest.raises(ConfigError, match="must rise from 0"):
        LinUCBPolicy(LinUCB(), horizons, 2)


def test_linucb_refuses_an_empty_context() -> None:
    with pytest.raises(ConfigError, match="context_size=0"):
        LinUCBPolicy(LinUCB(), (0,), 0)


@pytest.mark.parametrize(
    "damage",
    [
        {"A": [[[1.0, 2.0], [2.0, 1.0]]] * 2},
        {"A": [[[1.0, 0.0], [0.0, math.nan]]] * 2},
        {"A": [[[1.0]]] * 2},
        {"A": []},
        {"b": [[0.0, 0.0]]},
        {"b": [[0, 0], [0, 0]]},
        {"pulls": [1]},
        {"pulls": "many"},
        {"horizons": [0, 2]},
    ],
)
def test_linucb_refuses_broken_state_and_keeps_its_own(
    damage: dict[str, object],
) -> None:
    policy = LinUCBPolicy(LinUCB(), (0, 1), 2)
    policy.update(1, [1.0, 0.5], 0.3)
    before, scores = copy.deepcopy(policy.state_dict()), policy.scores([1.0, 0.2])
    with pytest.raises(CheckpointError):
        policy.load_state_dict({**copy.deepcopy(before), **damage})
    assert policy.state_dict() == before
    assert policy.scores([1.0, 0.2]) == scores
