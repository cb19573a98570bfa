"""LinUCB against a literal twin: its formulas as written, with explicit inverses."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hybridopt.config import LinUCB
from hybridopt.control.bandit import LinUCBPolicy

HORIZONS = (0, 1, 2, 4, 8)
SIZE = 6


class Twin:
    """A_a and b_a as written, inverted from scratch at every question."""

    def __init__(self, config: LinUCB) -> None:
        self.config = config
        self.eye = torch.eye(SIZE, dtype=torch.float64)
        self.A = {h: config.ridge * self.eye for h in HORIZONS}
        self.b = {h: torch.zeros(SIZE, dtype=torch.float64) for h in HORIZONS}

    def score(self, horizon: int, x: Tensor) -> float:
        inverse = torch.linalg.inv(self.A[horizon])
        theta = inverse @ self.b[horizon]
        return float(theta @ x + self.config.exploration * (x @ inverse @ x).sqrt())

    def choose(self, x: Tensor, longest: int) -> int:
        allowed = [h for h in HORIZONS if h <= longest] or [0]
        return max(allowed, key=lambda h: (round(self.score(h, x), 9), h))

    def update(self, horizon: int, x: Tensor, reward: float) -> None:
        gamma, ridge = self.config.discount, self.config.ridge
        self.A[horizon] = (
            gamma * self.A[horizon] + torch.outer(x, x) + (1 - gamma) * ridge * self.eye
        )
        self.b[horizon] = gamma * self.b[horizon] + reward * x


@pytest.mark.parametrize(
    "config",
    [
        LinUCB(),
        LinUCB(discount=1.0),
        LinUCB(discount=0.8, ridge=0.1, exploration=2.0),
        LinUCB(exploration=0.0, ridge=5.0),
    ],
)
def test_linucb_agrees_with_explicit_inverses(config: LinUCB) -> None:
    policy, twin = LinUCBPolicy(config, HORIZONS, SIZE), Twin(config)
    rng = random.Random(0)
    for _ in range(300):
        context = [1.0, *(rng.uniform(-1, 1) for _ in range(SIZE - 1))]
        x = torch.tensor(context, dtype=torch.float64)
        scores = [twin.score(h, x) for h in HORIZONS]
        torch.testing.assert_close(
            torch.tensor(policy.scores(context)),
            torch.tensor(scores),
            rtol=1e-9,
            atol=1e-11,
        )
        longest = rng.choice([-1, 0, 1, 3, 5, 100])
        arm = policy.choose(context, longest)
        assert HORIZONS[arm] == twin.choose(x, longest)
        reward = HORIZONS[arm] * context[1] + 0.1 * rng.gauss(0, 1)
        policy.update(arm, context, reward)
        twin.update(HORIZONS[arm], x, reward)


def test_linucb_state_holds_the_matrices_of_the_twin() -> None:
    config = LinUCB(discount=0.9)
    policy, twin = LinUCBPolicy(config, HORIZONS, SIZE), Twin(config)
    rng = random.Random(1)
    for _ in range(50):
        context = [rng.gauss(0, 1) for _ in range(SIZE)]
        arm, reward = rng.randrange(len(HORIZONS)), rng.gauss(0, 1)
        policy.update(arm, context, reward)
        twin.update(HORIZONS[arm], torch.tensor(context, dtype=torch.float64), reward)
    state = policy.state_dict()
    A = torch.tensor(state["A"], dtype=torch.float64)
    b = torch.tensor(state["b"], dtype=torch.float64)
    torch.testing.assert_close(A, torch.stack(list(twin.A.values())))
    torch.testing.assert_close(b, torch.stack(list(twin.b.values())))
    assert torch.equal(A, A.mT)
