"""Speed at equal loss, with confidence intervals over seeds, never extrapolated."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

__all__ = [
    "Bound",
    "Estimate",
    "Outcome",
    "amount_at_loss",
    "first_reach",
    "geometric_mean",
    "iso_loss_speedup",
    "loss_at_amount",
    "ratio",
    "target_speedup",
]

Bound = Literal["exact", "at_least", "at_most", "unclear"]
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
    fell short of the shortest baseline run, or never reached the target; unclear: a
    quotient of two bounds that says nothing about the truth's side."""
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
        low, high = self.interval
        spread = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return self.short + spread

    @property
    def short(self) -> str:
        """The value and how it bounds the truth, without the interval."""
        signs = {"exact": "", "at_least": "> ", "at_most": "< ", "unclear": "~ "}
        return f"{signs[self.bound]}{self.value:.2f}x"


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
    base: Sequence[float],
    reached: Sequence[float | None],
    spent: Sequence[float],
    *,
    seed: int = 0,
) -> Estimate:
    """Baseline amount over the arm's amount to reach the baseline's best loss.

    Args:
        base: What the baseline took to its best loss, per seed.
        reached: What the arm took to the same loss, same order of seeds; None where it
            never got there.
        spent: All that the arm spent.
        seed: Seed of the bootstrap.

    A seed that never reaches its target counts with the whole amount it spent, at least
    the baseline's, and the estimate is then an upper bound.
    """
    logs: list[float] = []
    bound: Bound = "exact"
    for target, amount, total in zip(base, reached, spent, strict=True):
        if amount is None:
            bound = "at_most"
            amount = max(total, target)
        logs.append(math.log(target / amount))

    def estimate(chosen: Sequence[int]) -> tuple[float, Bound]:
        return math.exp(sum(logs[i] for i in chosen) / len(chosen)), bound

    return _bootstrapped(estimate, len(logs), seed)


def ratio(arm: Estimate, reference: Estimate) -> Estimate:
    """One speedup over another, both over the same baseline, seeds and resamples.

    Where either is a bound, so is the ratio, if its direction is known.
    """
    flipped: dict[Bound, Bound] = {"at_least": "at_most", "at_most": "at_least"}
    kinds = {arm.bound, flipped.get(reference.bound, reference.bound)} - {"exact"}
    bound: Bound = "exact"
    if kinds:
        bound = kinds.pop() if len(kinds) == 1 else "unclear"
    pairs = zip(arm.replicates, reference.replicates, strict=False)
    replicates = tuple(a / b for a, b in pairs)
    return Estimate(arm.value / reference.value, bound, replicates)


def loss_at_amount(curve: Sequence[Outcome], amount: float) -> float:
    """Loss of the baseline with its schedule shortened to ``amount``; linear in log
    amount between two runs, nan outside of the measured range.
    """
    points = sorted((p for p in curve if math.isfinite(p.loss)), key=lambda p: p.amount)
    for before, after in pairwise(points):
        # A cost is a sum of thirds: equal to the end of the range up to rounding.
        if before.amount * (1 - 1e-9) <= amount <= after.amount * (1 + 1e-9):
            width = math.log(after.amount / before.amount)
            share = math.log(amount / before.amount) / width if width > 0 else 0.0
            return before.loss + share * (after.loss - before.loss)
    return math.nan


def geometric_mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean speedup over cases. Replicates pair by index: cases whose bootstraps have
    seeds of their own are resampled independently.
    """
    value = _geometric([e.value for e in estimates])
    bounds = {e.bound for e in estimates} - {"exact"}
    bound: Bound = "exact"
    if bounds:
        # With both kinds of bounds the mean is bounded on neither side: the pessimistic
        # reading is that it is at most this.
        bound = "at_most" if "at_most" in bounds else "at_least"
        bound = "unclear" if "unclear" in bounds else bound
    # A case with a single seed has no spread to show; the mean then shows none either.
    size = min(len(e.replicates) for e in estimates)
    columns = zip(*(e.replicates[:size] for e in estimates), strict=True)
    return Estimate(value, bound, tuple(_geometric(list(c)) for c in columns))


def _bootstrapped(
    estimate: Callable[[Sequence[int]], tuple[float, Bound]], count: int, seed: int
) -> Estimate:
    value, bound = estimate(range(count))
    if count < 2:
        return Estimate(value, bound, ())
    # Few seeds have few different resamples: 10 for three, 126 for five.
    resamples = _resamples(count, seed)
    known = {chosen: estimate(chosen)[0] for chosen in dict.fromkeys(resamples)}
    return Estimate(value, bound, tuple(known[chosen] for chosen in resamples))


@lru_cache(maxsize=64)
def _resamples(count: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """The seeds that each replicate holds; the same for all arms of a case."""
    generator = random.Random(seed)
    return tuple(
        tuple(sorted(generator.randrange(count) for _ in range(count)))
        for _ in range(REPLICATES)
    )


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    loss = sum(o.loss for o in outcomes) / len(outcomes)
    return Outcome(loss, _geometric([o.amount for o in outcomes]))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))
