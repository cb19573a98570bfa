"""From runs to speedups, class means and verdicts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.estimates import (
    Estimate,
    Outcome,
    geometric_mean,
    iso_loss_speedup,
    loss_at_amount,
    ratio,
    target_speedup,
)
from benchmarks.runner import Run
from benchmarks.suite import CaseResult, Clock

__all__ = [
    "TARGETS",
    "ArmFigures",
    "ClassFigures",
    "Target",
    "against_default",
    "arm_figures",
    "class_figures",
    "same_steps",
]

COST, WALL, PROCESS = range(3)
"""Order of what a run took, as in ``Run.amounts``."""


@dataclass(frozen=True)
class Target:
    """What a class must reach, as a mean speedup or as a floor for each case."""

    must: float
    reach: float
    floor: float = 0.0
    """No case of the class may be below this."""


TARGETS = {
    "fine-tuning, conservative": Target(6.0, 15.0),
    "fine-tuning, 1e-4": Target(4.0, 6.0),
    "fine-tuning, 3e-4": Target(1.6, 2.0),
    "fine-tuning, tuned": Target(1.0, 1.1),
    "smooth, default rate": Target(6.0, 12.0),
    "smooth, tuned rate": Target(4.0, 8.0, floor=1.0),
    "stochastic, rate 10x too low": Target(1.9, 3.0),
    "stochastic, tuned": Target(1.05, 1.15),
    "controls": Target(0.98, 1.0, floor=0.98),
    "any base, any rate": Target(0.98, 1.0, floor=0.98),
}
"""Speedup at equal loss in time, as a geometric mean over the class."""


@dataclass(frozen=True)
class ArmFigures:
    """One arm on one case at one length, over the seeds that it and the base ran."""

    case: str
    arm: str
    fraction: float
    seeds: int
    loss: float
    base_loss: float
    """Loss of the bare base after the same scheduled steps."""
    base_loss_same_cost: float
    """Loss of the bare base with its schedule shortened to the arm's cost; nan outside
    of what was measured."""
    speedups: tuple[Estimate | None, Estimate | None, Estimate | None]
    """At equal loss: in cost, wall time, process time."""
    objective: float
    objective_speedup: Estimate | None
    """In cost, at equal training objective."""
    backward_reduction: float
    """Share of the scheduled steps that ran no backward."""
    validations: float
    wall_s: float
    peak_bytes: float
    bookkeeping_share: float
    failures: int

    @property
    def cost_speedup(self) -> Estimate | None:
        """At equal loss, in real steps."""
        return self.speedups[COST]

    def time_speedup(self, clock: Clock) -> Estimate | None:
        """At equal loss, by the clock that the machine is judged by."""
        return self.speedups[PROCESS if clock == "process" else WALL]


def arm_figures(result: CaseResult, *arms: str) -> list[ArmFigures]:
    """Figures of every arm and length in a case, the bare base's first.

    Args:
        result: The case.
        arms: Those to work out; all without any.
    """
    runs = (r for r in result.runs if not arms or r.arm in arms)
    keys = dict.fromkeys((r.arm, r.fraction) for r in runs)
    return [_figures(result, arm, fraction) for arm, fraction in keys]


def _figures(result: CaseResult, arm: str, fraction: float) -> ArmFigures:
    runs = result.of(arm, fraction)
    base = result.of("base", fraction)
    whole = [r for r in runs if not r.failure]
    objectives = [r.objective for r in whole if not math.isnan(r.objective)]
    shares = [r.bookkeeping_share for r in runs if not math.isnan(r.bookkeeping_share)]
    common = {r.seed for r in whole}
    curve, mine = _curve(result, runs, COST, lambda r: r.final_loss)
    shortened = math.nan
    if result.mode == "schedule" and mine and len(curve) > 1:
        means = [_mean_outcome(row) for row in curve]
        shortened = loss_at_amount(means, _mean_outcome(mine).amount)
    return ArmFigures(
        case=result.case,
        arm=arm,
        fraction=fraction,
        seeds=len(runs),
        loss=_mean([r.final_loss for r in runs]),
        base_loss=_mean([r.final_loss for r in base if r.seed in common]),
        base_loss_same_cost=shortened,
        speedups=tuple(_speedup(result, runs, i) for i in range(3)),  # type: ignore[arg-type]
        objective=_mean(objectives),
        objective_speedup=_objective_speedup(result, runs, bool(objectives)),
        backward_reduction=_mean([1.0 - r.backwards / r.done for r in runs if r.done]),
        validations=_mean([float(r.validations) for r in runs]),
        wall_s=_mean([r.wall_s for r in runs]),
        peak_bytes=_mean([float(r.peak_bytes) for r in runs]),
        bookkeeping_share=_mean(shares),
        failures=sum(bool(r.failure) for r in runs),
    )


def _mean_outcome(row: Sequence[Outcome]) -> Outcome:
    loss = sum(o.loss for o in row) / len(row)
    return Outcome(loss, sum(o.amount for o in row) / len(row))


def _curve(
    result: CaseResult, runs: list[Run], amount: int, value: Callable[[Run], float]
) -> tuple[list[list[Outcome]], list[Outcome]]:
    """The base's runs by length and the arm's runs, over the seeds that all have."""
    lengths = sorted({r.fraction for r in result.runs if r.arm == "base"})
    rows = [result.of("base", length) for length in lengths]
    seeds = {r.seed for r in runs}
    for row in rows:
        seeds &= {r.seed for r in row}

    def outcomes(row: list[Run]) -> list[Outcome]:
        return [
            Outcome(_worst_if_nan(value(r)), r.amounts(r)[amount])
            for r in row
            if r.seed in seeds
        ]

    return [outcomes(row) for row in rows], outcomes(runs)


def _seed(result: CaseResult) -> int:
    """Resamples are shared by a case's arms and independent between cases."""
    return zlib.crc32(result.case.encode())


def _speedup(result: CaseResult, runs: list[Run], amount: int) -> Estimate | None:
    """Speedup of runs over the bare base; None where an arm failed or spent nothing."""
    if not runs or any(r.failure or r.amounts(r)[amount] <= 0.0 for r in runs):
        return None
    if result.mode == "target":
        return _target(result, runs, amount)
    curve, mine = _curve(result, runs, amount, lambda r: r.final_loss)
    if len(curve) < 2 or not mine:
        return None
    return iso_loss_speedup(curve, mine, seed=_seed(result))


def _objective_speedup(
    result: CaseResult, runs: list[Run], known: bool
) -> Estimate | None:
    if not known or result.mode == "target" or any(r.failure for r in runs):
        return None
    curve, mine = _curve(result, runs, COST, lambda r: r.objective)
    if len(curve) < 2 or not mine or any(o.amount <= 0.0 for o in mine):
        return None
    return iso_loss_speedup(curve, mine, seed=_seed(result))


def _target(result: CaseResult, runs: list[Run], amount: int) -> Estimate | None:
    """Both sides are timed to the base's best loss within its N steps."""
    base = {r.seed: r for r in result.of("base", 1.0)}
    pairs = [(base[r.seed], r) for r in runs if r.seed in base]
    if not pairs or any(not b.reached or b.reached[amount] <= 0.0 for b, _ in pairs):
        return None
    return target_speedup(
        [b.reached[amount] for b, _ in pairs if b.reached],
        [None if r.reached is None else r.reached[amount] for _, r in pairs],
        [r.amounts(r)[amount] for _, r in pairs],
        seed=_seed(result),
    )


def _worst_if_nan(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class ClassFigures:
    """One arm on one class of cases, at one length of its runs."""

    family: str
    arm: str
    fraction: float
    """Scheduled steps of the arm's runs over the cases' own."""
    headline: bool
    """Whether this is the length that the class is judged by."""
    cases: tuple[str, ...]
    """Those that count in the means."""
    lost: tuple[str, ...]
    """Those that the arm broke on, or could not be judged on."""
    cost: Estimate
    time: Estimate
    worst: float
    """Smallest speedup in time of a case in the class."""
    target: Target | None

    @property
    def verdict(self) -> str:
        """Pass or fail against the class's target; '-' without one."""
        if self.target is None:
            return "-"
        enough = self.time.value >= self.target.must and self.time.bound != "at_most"
        enough = enough and self.worst >= self.target.floor and not self.lost
        return "pass" if enough else "fail"


def class_figures(results: Sequence[CaseResult], arm: str) -> list[ClassFigures]:
    """Geometric means over each class, one per length that the arm was run at.

    A case on which the arm broke is left out of the mean and fails the class.
    """
    found = [(r, f) for r in results if not r.skipped for f in arm_figures(r, arm)]
    classes: list[ClassFigures] = []
    for family, fraction in dict.fromkeys((r.family, f.fraction) for r, f in found):
        chosen = [
            (r, f) for r, f in found if (r.family, f.fraction) == (family, fraction)
        ]
        judged = [
            (f, f.cost_speedup, time)
            for r, f in chosen
            if f.cost_speedup is not None
            and (time := f.time_speedup(r.clock)) is not None
        ]
        if not judged:
            continue
        names = tuple(f.case for f, _, _ in judged)
        classes.append(
            ClassFigures(
                family,
                arm,
                fraction,
                all(r.headline == fraction for r, _ in chosen),
                names,
                tuple(f.case for _, f in chosen if f.case not in names),
                geometric_mean([cost for _, cost, _ in judged]),
                geometric_mean([time for _, _, time in judged]),
                min(time.value for _, _, time in judged),
                TARGETS.get(family),
            )
        )
    return classes


def against_default(
    results: Sequence[CaseResult], arm: str, *, by_time: bool
) -> dict[str, Estimate]:
    """By class: an ablation's speedup over that of the default, paired, at the class's
    own length, over the cases that both can be judged on.
    """
    ratios: dict[str, list[Estimate]] = {}
    for result in results:
        both = arm_figures(result, arm, "hybrid")
        figures = {f.arm: f for f in both if _headline(result, f)}
        if arm not in figures or "hybrid" not in figures:
            continue
        pair = [
            f.time_speedup(result.clock) if by_time else f.cost_speedup
            for f in (figures[arm], figures["hybrid"])
        ]
        if pair[0] is not None and pair[1] is not None:
            quotient = ratio(pair[0], pair[1])
            ratios.setdefault(result.family, []).append(quotient)
    return {family: geometric_mean(found) for family, found in ratios.items()}


def _headline(result: CaseResult, figures: ArmFigures) -> bool:
    return figures.fraction == result.headline


@dataclass(frozen=True)
class SameSteps:
    """Conservative fine-tuning at the bare base's own number of scheduled steps."""

    reduction: float
    loss: float
    base_loss: float

    @property
    def verdict(self) -> str:
        """At least 80 % fewer backwards at no higher loss."""
        enough = self.reduction >= 0.8 and self.loss <= self.base_loss
        return "pass" if enough else "fail"


def same_steps(results: Sequence[CaseResult]) -> dict[str, SameSteps]:
    """Backward reduction of hybridopt per conservative fine-tuning case."""
    return {
        r.case: SameSteps(f.backward_reduction, f.loss, f.base_loss)
        for r in results
        if r.family == "fine-tuning, conservative" and not r.skipped
        for f in arm_figures(r)
        if f.arm == "hybrid" and f.fraction == 1.0
    }
