"""From runs to speedups, class means and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.estimates import (
    Estimate,
    Outcome,
    first_reach,
    geometric_mean,
    iso_loss_speedup,
    target_speedup,
)
from benchmarks.runner import Point, Run
from benchmarks.suite import CaseResult, Clock

__all__ = ["TARGETS", "ArmFigures", "ClassFigures", "arm_figures", "class_figures"]

Amount = Callable[[Run | Point], float]


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
}
"""Speedup at equal loss in time, as a geometric mean over the class."""


@dataclass(frozen=True)
class ArmFigures:
    """One arm on one case at one length, over all seeds."""

    case: str
    arm: str
    fraction: float
    seeds: int
    loss: float
    base_loss: float
    """Loss of the bare base after the same scheduled steps."""
    cost_speedup: Estimate | None
    wall_speedup: Estimate | None
    process_speedup: Estimate | None
    backward_reduction: float
    """Share of the scheduled steps that ran no backward."""
    validations: float
    wall_s: float
    peak_bytes: float
    bookkeeping_share: float
    failures: int


def _cost(r: Run | Point) -> float:
    return r.cost


def _wall(r: Run | Point) -> float:
    return r.wall_s


def _process(r: Run | Point) -> float:
    return r.process_s


def arm_figures(result: CaseResult) -> list[ArmFigures]:
    """Figures of every arm and length in a case, the bare base's first."""
    keys = dict.fromkeys((r.arm, r.fraction) for r in result.runs)
    return [_figures(result, arm, fraction) for arm, fraction in keys]


def _figures(result: CaseResult, arm: str, fraction: float) -> ArmFigures:
    runs = result.of(arm, fraction)
    base = result.of("base", fraction)
    reductions = [1.0 - r.backwards / r.points[-1].step for r in runs if _ran(r)]
    shares = [r.bookkeeping_share for r in runs if not math.isnan(r.bookkeeping_share)]
    return ArmFigures(
        case=result.case,
        arm=arm,
        fraction=fraction,
        seeds=len(runs),
        loss=_mean([r.final_loss for r in runs]),
        base_loss=_mean([r.final_loss for r in base]),
        cost_speedup=_speedup(result, runs, _cost),
        wall_speedup=_speedup(result, runs, _wall),
        process_speedup=_speedup(result, runs, _process),
        backward_reduction=_mean(reductions),
        validations=_mean([float(r.validations) for r in runs]),
        wall_s=_mean([r.wall_s for r in runs]),
        peak_bytes=_mean([float(r.peak_bytes) for r in runs]),
        bookkeeping_share=_mean(shares),
        failures=sum(bool(r.failure) for r in runs),
    )


def _ran(r: Run) -> bool:
    return bool(r.points) and r.points[-1].step > 0


def _speedup(result: CaseResult, runs: list[Run], amount: Amount) -> Estimate | None:
    """Speedup of runs over the bare base; None where an arm failed or spent nothing."""
    if not runs or any(r.failure or amount(r) <= 0.0 for r in runs):
        return None
    if result.mode == "target":
        return _target(result, runs, amount)
    budgets = sorted({r.fraction for r in result.runs if r.arm == "base"})
    baseline = [result.of("base", b) for b in budgets]
    complete = [row for row in baseline if len(row) == len(runs)]
    if len(complete) < 2:
        return None
    return iso_loss_speedup(
        [[Outcome(r.final_loss, amount(r)) for r in row] for row in complete],
        [Outcome(_worst_if_nan(r.final_loss), amount(r)) for r in runs],
    )


def _target(result: CaseResult, runs: list[Run], amount: Amount) -> Estimate | None:
    """Both sides are timed to the base's best loss within its N steps."""
    base = result.of("base", 1.0)
    if len(base) != len(runs):
        return None
    targets, paths = [], []
    for reference, r in zip(base, runs, strict=True):
        best = min(p.loss for p in reference.points)
        needed = first_reach(_path(reference, amount), best)
        if needed is None or needed <= 0.0:
            return None
        targets.append(Outcome(best, needed))
        paths.append(_path(r, amount))
    return target_speedup(targets, paths)


def _path(r: Run, amount: Amount) -> list[Outcome]:
    return [Outcome(p.loss, amount(p)) for p in r.points]


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
    cost: Estimate
    wall: Estimate
    process: Estimate
    clock: Clock
    """The time that the class is judged by."""
    worst: float
    """Smallest speedup of a case in the class, by that clock."""
    target: Target | None
    failed: bool = False
    """Whether the arm broke, or could not be judged, on a case of the class."""

    @property
    def verdict(self) -> str:
        """Pass or fail against the class's target; '-' without one."""
        if self.target is None:
            return "-"
        time = self.process if self.clock == "process" else self.wall
        enough = time.value >= self.target.must and time.bound != "at_most"
        enough = enough and self.worst >= self.target.floor and not self.failed
        return "pass" if enough else "fail"


def class_figures(results: Sequence[CaseResult], arm: str) -> list[ClassFigures]:
    """Geometric means over each class, one per length that the arm was run at.

    A case on which the arm broke is left out of the mean and fails the class.
    """
    classes: list[ClassFigures] = []
    found = [
        (r, f) for r in results if not r.skipped for f in arm_figures(r) if f.arm == arm
    ]
    for family, fraction in dict.fromkeys((r.family, f.fraction) for r, f in found):
        chosen = [
            (r, f) for r, f in found if (r.family, f.fraction) == (family, fraction)
        ]
        figures = [f for _, f in chosen]
        cost = [f.cost_speedup for f in figures if f.cost_speedup is not None]
        wall = [f.wall_speedup for f in figures if f.wall_speedup is not None]
        process = [f.process_speedup for f in figures if f.process_speedup is not None]
        if not cost or not wall or not process:
            continue
        clock = chosen[0][0].clock
        classes.append(
            ClassFigures(
                family,
                arm,
                fraction,
                all(r.headline == fraction for r, _ in chosen),
                tuple(f.case for f in figures),
                geometric_mean(cost),
                geometric_mean(wall),
                geometric_mean(process),
                clock,
                min(e.value for e in (process if clock == "process" else wall)),
                TARGETS.get(family),
                len(wall) < len(figures),
            )
        )
    return classes


@dataclass(frozen=True)
class SameSteps:
    """Conservative fine-tuning at the bare base's own number of scheduled steps."""

    reduction: float
    loss: float
    base_loss: float

    @property
    def verdict(self) -> str:
        """At least 80 % fewer backwards at no higher loss."""
        return (
            "pass" if self.reduction >= 0.8 and self.loss <= self.base_loss else "fail"
        )


def same_steps(results: Sequence[CaseResult]) -> dict[str, SameSteps]:
    """Backward reduction of hybridopt per conservative fine-tuning case."""
    return {
        r.case: SameSteps(f.backward_reduction, f.loss, f.base_loss)
        for r in results
        if r.family == "fine-tuning, conservative" and not r.skipped
        for f in arm_figures(r)
        if f.arm == "hybrid" and f.fraction == 1.0
    }
