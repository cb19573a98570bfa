"""Chooses the horizon of a Predict phase: discounted LinUCB, or always the longest.

Plain Python floats: with half a dozen context numbers, the calls into a tensor library
would cost several times the arithmetic, and they would be made at every real step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import mul
from typing import Any, assert_never

from hybridopt.config import FixedHorizon, LinUCB
from hybridopt.errors import CheckpointError, ConfigError
from hybridopt.protocols import HorizonPolicy

__all__ = ["FixedHorizonPolicy", "LinUCBPolicy", "build_horizons", "build_policy"]

LIMIT = 1e3
"""Contexts and rewards are clipped to this magnitude: they are of order one, and a
single absurd value would otherwise drown the rest of an arm's history."""
TIE = 1e-12
"""Relative difference of scores that counts as a tie; rounding is below it."""
Rows = list[list[float]]
"""A matrix, or the lower triangle of one, row by row."""


def build_horizons(max_predict_steps: int) -> tuple[int, ...]:
    """The arms 0, 1, 2, 3, 4, 6, 8, 12, ... and ``max_predict_steps``, in steps.

    Two per octave: between powers of two alone, up to half of what a move is worth
    would go unused.
    """
    powers = [1 << k for k in range(max_predict_steps.bit_length())]
    between = [3 * p // 2 for p in powers if p > 1]
    arms = {0, max_predict_steps, *powers, *between}
    return tuple(sorted(h for h in arms if h <= max_predict_steps))


def build_policy(
    config: LinUCB | FixedHorizon, max_predict_steps: int, context_size: int
) -> HorizonPolicy:
    """The policy that the configuration names, over the horizons up to the longest."""
    horizons = build_horizons(max_predict_steps)
    match config:
        case LinUCB():
            return LinUCBPolicy(config, horizons, context_size)
        case FixedHorizon():
            return FixedHorizonPolicy(horizons)
        case _:
            assert_never(config)


class LinUCBPolicy:
    """Discounted LinUCB with disjoint arms.

    Arm a keeps A_a (d, d) and b_a (d,), at first lambda I and 0. It is played when its
    horizon is allowed and its score

        theta_a' x + alpha sqrt(x' A_a^-1 x),    theta_a = A_a^-1 b_a

    is the highest; ties go to the longest horizon. A reward r in context x gives

        A_a <- gamma A_a + x x' + (1 - gamma) lambda I,    b_a <- gamma b_a + r x,

    so that old rewards fade while A_a - lambda I stays positive semidefinite: its
    smallest eigenvalue never falls below lambda, its largest stays below
    lambda + max ||x||^2 / (1 - gamma). With A = L L', L^-1 is computed anew at each
    update, d being a handful, and so accumulates no errors.

    Source: Li et al. 2010 (arXiv 1003.0146), algorithm 1; discount after Russac et al.
    2019 (arXiv 1909.09146). Differs: only the updated arm is discounted, so an arm that
    has proved bad is not tried again just because time passes.

    Args:
        config: alpha (``exploration``), lambda (``ridge``), gamma (``discount``).
        horizons: Steps per arm, rising, the first 0.
        context_size: d.

    Raises:
        ConfigError: Horizons that do not rise from 0, or d below 1.
    """

    def __init__(
        self, config: LinUCB, horizons: tuple[int, ...], context_size: int
    ) -> None:
        _check_horizons(horizons)
        if context_size < 1:
            raise ConfigError(
                f"context_size={context_size}: must be >= 1. A context of just the "
                "number 1 makes the bandit context-free."
            )
        self.config = config
        self.horizons = horizons
        self.context_size = context_size
        d = context_size
        self._A: list[Rows] = [_scaled_identity(config.ridge, d) for _ in horizons]
        self._b: Rows = [[0.0] * d for _ in horizons]
        self._pulls = [0 for _ in horizons]
        # L^-1 and theta per arm, made when a score is asked for; None until then.
        self._solved: list[tuple[Rows, list[float]] | None] = [None for _ in horizons]

    @property
    def pulls(self) -> tuple[int, ...]:
        """Updates per arm."""
        return tuple(self._pulls)

    def scores(self, context: Sequence[float], count: int | None = None) -> list[float]:
        """Upper confidence bounds of the rewards of the first arms, or of all."""
        x = self._vector(context)
        alpha = self.config.exploration
        found = []
        for arm in range(len(self.horizons) if count is None else count):
            root, theta = self._solution(arm)
            # x' A^-1 x = ||L^-1 x||^2; rows of L^-1 end at the diagonal, as does map.
            spread = math.sqrt(sum([_dot(row, x) ** 2 for row in root]))
            found.append(_dot(theta, x) + alpha * spread)
        return found

    def _solution(self, arm: int) -> tuple[Rows, list[float]]:
        solved = self._solved[arm]
        if solved is None:
            solved = self._solved[arm] = _solve(self._A[arm], self._b[arm])
        return solved

    def choose(self, context: Sequence[float], longest: int) -> int:
        """The qualifying arm with the best score; of equal ones the longest."""
        allowed = _count_allowed(self.horizons, longest)
        if allowed == 1:
            return 0
        scores = self.scores(context, allowed)
        best = max(scores)
        bar = best - TIE * (1.0 + abs(best))
        return max(arm for arm, score in enumerate(scores) if score >= bar)

    def update(self, arm: int, context: Sequence[float], reward: float) -> None:
        """Learn a reward; one that is not finite says nothing and is left out."""
        x = self._vector(context)
        if not math.isfinite(reward):
            return
        reward = max(-LIMIT, min(LIMIT, reward))
        gamma = self.config.discount
        kept = (1 - gamma) * self.config.ridge
        # Symmetric to the bit: entries (i, j) and (j, i) come from equal operations.
        A = [
            [gamma * a + x_i * x_j for a, x_j in zip(row, x, strict=True)]
            for row, x_i in zip(self._A[arm], x, strict=True)
        ]
        for i, row in enumerate(A):
            row[i] += kept
        self._A[arm] = A
        self._b[arm] = [
            gamma * b + reward * v for b, v in zip(self._b[arm], x, strict=True)
        ]
        self._pulls[arm] += 1
        self._solved[arm] = None

    def state_dict(self) -> dict[str, Any]:
        """A (rows), b and pulls per arm; all else follows from them."""
        return {
            "horizons": list(self.horizons),
            "A": [[list(row) for row in A] for A in self._A],
            "b": [list(b) for b in self._b],
            "pulls": list(self._pulls),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change when the arms or sizes differ."""
        _check_state(state, ("horizons", "A", "b", "pulls"), self.horizons)
        count, d = len(self.horizons), self.context_size
        bs = _rows(state["b"], count, d, "b")
        if not isinstance(state["A"], list) or len(state["A"]) != count:
            raise _mismatch("A: must be one matrix per arm")
        As = [_rows(A, d, d, "A") for A in state["A"]]
        pulls = state["pulls"]
        counts = isinstance(pulls, list) and all(isinstance(n, int) for n in pulls)
        if not counts or len(pulls) != count:
            raise _mismatch(f"pulls={pulls!r}: must be one count per arm")
        try:
            solved = [_solve(A, b) for A, b in zip(As, bs, strict=True)]
        except (ValueError, ZeroDivisionError):
            raise _mismatch("A: must be positive definite for every arm") from None
        self._A, self._b, self._pulls = As, bs, list(pulls)
        self._solved = list(solved)

    def _vector(self, context: Sequence[float]) -> list[float]:
        """The context, clipped; what is not finite counts as unknown, as 0."""
        if len(context) != self.context_size:
            raise ConfigError(
                f"context of {len(context)} numbers: must have {self.context_size}. "
                "Build the policy with the size of the contexts it will see."
            )
        return [
            max(-LIMIT, min(LIMIT, float(v))) if math.isfinite(v) else 0.0
            for v in context
        ]


class FixedHorizonPolicy:
    """Always the longest horizon that is allowed; learns nothing.

    Args:
        horizons: Steps per arm, rising, the first 0.

    Raises:
        ConfigError: Horizons that do not rise from 0.
    """

    def __init__(self, horizons: tuple[int, ...]) -> None:
        _check_horizons(horizons)
        self.horizons = horizons

    def choose(self, context: Sequence[float], longest: int) -> int:
        """The longest arm that qualifies, whatever the context."""
        return _count_allowed(self.horizons, longest) - 1

    def update(self, arm: int, context: Sequence[float], reward: float) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """The horizons, so that a checkpoint of other arms is noticed."""
        return {"horizons": list(self.horizons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the state of equal arms; CheckpointError otherwise."""
        _check_state(state, ("horizons",), self.horizons)


def _count_allowed(horizons: tuple[int, ...], longest: int) -> int:
    """How many arms, from the first, are no longer than ``longest``; at least one."""
    return max(1, sum(h <= longest for h in horizons))


def _check_horizons(horizons: tuple[int, ...]) -> None:
    rising = all(a < b for a, b in itertools.pairwise(horizons))
    if not horizons or horizons[0] != 0 or not rising:
        raise ConfigError(
            f"horizons={horizons}: must rise from 0. Use build_horizons(longest)."
        )


def _mismatch(rule: str) -> CheckpointError:
    return CheckpointError(
        f"state of the horizon policy: {rule}. "
        "Load with the configuration that the checkpoint was saved with."
    )


def _check_state(state: Any, keys: tuple[str, ...], horizons: tuple[int, ...]) -> None:
    if not isinstance(state, dict) or set(state) != set(keys):
        raise _mismatch(f"must have exactly the keys {sorted(keys)}")
    if state["horizons"] != list(horizons):
        raise _mismatch(f"horizons={state['horizons']!r}: must be {list(horizons)}")


def _rows(value: Any, count: int, size: int, name: str) -> Rows:
    """A copy of ``count`` lists of ``size`` finite floats."""
    good = isinstance(value, list) and len(value) == count
    for row in value if good else ():
        good = good and isinstance(row, list) and len(row) == size
        good = good and all(isinstance(v, float) and math.isfinite(v) for v in row)
    if not good:
        raise _mismatch(f"{name}: must be {count} lists of {size} finite numbers")
    return [list(row) for row in value]


def _scaled_identity(scale: float, size: int) -> Rows:
    return [[scale if i == j else 0.0 for j in range(size)] for i in range(size)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Inner product over the shorter length."""
    total: float = sum(map(mul, a, b))
    return total


def _solve(A: Rows, b: Sequence[float]) -> tuple[Rows, list[float]]:
    """L^-1 as rows up to the diagonal, and A^-1 b = L^-T (L^-1 b)."""
    root = _inverse_root(A)
    half = [_dot(row, b) for row in root]
    size = len(b)
    theta = [sum(root[i][j] * half[i] for i in range(j, size)) for j in range(size)]
    return root, theta


def _inverse_root(A: Rows) -> Rows:
    """L^-1 with A = L L', rows up to the diagonal.

    Raises:
        ValueError, ZeroDivisionError: A is not positive definite.
    """
    L: Rows = []
    for i, source in enumerate(A):
        row: list[float] = []
        for j in range(i):
            row.append((source[j] - _dot(row, L[j])) / L[j][j])
        row.append(math.sqrt(source[i] - _dot(row, row)))
        L.append(row)
    inverse: Rows = []
    for i, row in enumerate(L):
        # Forward substitution: row i of L^-1 from those above it.
        scale = 1.0 / row[i]
        inverse.append(
            [
                -scale * sum(row[k] * inverse[k][j] for k in range(j, i))
                for j in range(i)
            ]
        )
        inverse[i].append(scale)
    return inverse
