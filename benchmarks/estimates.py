"""Speed at equal loss, with confidence intervals over seeds, never extrapolated."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Bound",
    "Estimate",
    "Outcome",
    "amount_at_loss",
    "first_reach",
    "geometric_mean",
    "iso_loss_speedup",
    "target_speedup",
]

Bound = Literal["exact", "at_least", "at_most"]
REPLICATES = 1000
"""Bootstrap replicates."""


@dataclass(frozen=True)
class Outcome:
    """Where one run ended: its loss, and what it took (cost or seconds)."""

    loss: float
    amount: float


@dataclass(frozen=True)
class Estimate:
    """A speedup with its bootstrap replicates."""

    value: float
    bound: Bound
    """at_least: the arm went beyond what any baseline run reached; at_most: the arm
    fell short of the shortest baseline run, or never reached the target."""
    replicates: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile interval over seeds; nan with a single seed."""
        if len(self.replicates) < 2:
            return (math.nan, math.nan)
        ordered = sorted(self.replicates)
        last = len(ordered) - 1
        return (ordered[round(0.025 * last)], ordered[round(0.975 * last)])

    def __str__(self) -> str:
        sign = {"exact": "", "at_least": "> ", "at_most": "< "}[self.bound]
        low, high = self.interval
        spread = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return f"{sign}{self.value:.2f}x{spread}"


def amount_at_loss(curve: Sequence[Outcome], loss: float) -> tuple[float, Bound]:
    """The amount at which the baseline reaches ``loss``.

    The curve holds runs of rising length, each with a schedule of its own. Its running
    minimum is taken first: a longer run that ended worse does not make the baseline
    slower. Between two runs, log amount is linear in the loss.

    Returns:
        The amount and how it bounds the truth: outside the measured range it is the
        end of the range.
    """
    points = sorted((p for p in curve if math.isfinite(p.loss)), key=lambda p: p.amount)
    if not points:
        return math.nan, "exact"
    if not math.isfinite(loss) or loss > points[0].loss:
        return points[0].amount, "at_most"
    best = points[0]
    for point in points:
        if point.loss > best.loss or point is points[0]:
            continue
        if point.loss <= loss:
            return _between(best, point, loss), "exact"
        best = point
    if loss == best.loss:
        return best.amount, "exact"
    return points[-1].amount, "at_least"


def _between(before: Outcome, after: Outcome, loss: float) -> float:
    """Amount at ``loss`` on the chord of log amount over loss."""
    if after.loss == before.loss:
        return before.amount
    share = (before.loss - loss) / (before.loss - after.loss)
    low, high = math.log(before.amount), math.log(after.amount)
    return math.exp(low + share * (high - low))


def iso_loss_speedup(
    baseline: Sequence[Sequence[Outcome]], arm: Sequence[Outcome], *, seed: int = 0
) -> Estimate:
    """How much more the baseline needs for the arm's loss than the arm took.

    Args:
        baseline: One row per schedule length, one outcome per seed.
        arm: One outcome per seed, in the same order of seeds.
        seed: Seed of the bootstrap.

    Seeds are resampled for baseline and arm together (the runs are paired); losses are
    averaged over seeds before interpolating, amounts by their geometric mean.
    """
    count = len(arm)
    if any(len(row) != count for row in baseline):
        raise ValueError(
            "baseline and arm: must have the same seeds in the same order."
        )

    def estimate(chosen: Sequence[int]) -> tuple[float, Bound]:
        curve = [_mean([row[i] for i in chosen]) for row in baseline]
        reached = _mean([arm[i] for i in chosen])
        amount, bound = amount_at_loss(curve, reached.loss)
        return amount / reached.amount, bound

    return _bootstrapped(estimate, count, seed)


def first_reach(path: Sequence[Outcome], loss: float) -> float | None:
    """Amount at which one run first gets to ``loss``, log-linear between its points.

    None when it never does. Every point's loss is that of the weights at that amount.
    """
    before: Outcome | None = None
    for point in path:
        if point.loss <= loss:
            if before is None or before.amount <= 0.0:
                return point.amount
            return _between(before, point, loss)
        if math.isfinite(point.loss):
            before = point
    return None


def target_speedup(
    targets: Sequence[Outcome], paths: Sequence[Sequence[Outcome]], *, seed: int = 0
) -> Estimate:
    """Baseline amount over the arm's amount to reach the baseline's final loss.

    Args:
        targets: The baseline's end per seed.
        paths: The arm's course per seed, same order.
        seed: Seed of the bootstrap.

    A seed that never reaches its target counts with the whole amount it spent, and the
    estimate is then an upper bound.
    """
    logs: list[float] = []
    bound: Bound = "exact"
    for target, path in zip(targets, paths, strict=True):
        reached = first_reach(path, target.loss)
        if reached is None:
            bound = "at_most"
            reached = max(path[-1].amount, target.amount)
        logs.append(math.log(target.amount / reached))

    def estimate(chosen: Sequence[int]) -> tuple[float, Bound]:
        return math.exp(sum(logs[i] for i in chosen) / len(chosen)), bound

    return _bootstrapped(estimate, len(logs), seed)


def geometric_mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean speedup over cases; cases are independent, replicates pair by index."""
    value = _geometric([e.value for e in estimates])
    bounds = {e.bound for e in estimates} - {"exact"}
    bound: Bound = "exact"
    if bounds:
        # With both kinds of bounds the mean is bounded on neither side: the pessimistic
        # reading is that it is at most this.
        bound = "at_most" if "at_most" in bounds else "at_least"
    size = min(len(e.replicates) for e in estimates)
    columns = zip(*(e.replicates[:size] for e in estimates), strict=True)
    return Estimate(value, bound, tuple(_geometric(list(c)) for c in columns))


def _bootstrapped(
    estimate: Callable[[Sequence[int]], tuple[float, Bound]], count: int, seed: int
) -> Estimate:
    value, bound = estimate(range(count))
    if count < 2:
        return Estimate(value, bound, ())
    generator = random.Random(seed)
    replicates = tuple(
        estimate([generator.randrange(count) for _ in range(count)])[0]
        for _ in range(REPLICATES)
    )
    return Estimate(value, bound, replicates)


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    loss = sum(o.loss for o in outcomes) / len(outcomes)
    return Outcome(loss, _geometric([o.amount for o in outcomes]))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))
