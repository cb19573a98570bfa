"""What a case consists of, and its runs for one seed: every arm and budget, paired."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.arms import ARMS, Arm, Setup
from benchmarks.cases import BUDGETS, Case
from benchmarks.pacing import Pacer
from benchmarks.runner import Limits, Run, Task, run
from benchmarks.tasks.base import Setting

__all__ = ["CaseResult", "Clock", "Options", "Planned", "planned", "runs_of"]

Clock = Literal["wall", "process"]

TARGET_GROWTH = 0.03
TARGET_PATIENCE = 2.0
"""In target mode arms get this many times the base's steps to reach its loss."""
WARM_UP_SHARE = 0.25
"""Steps of hybridopt's warm-up on a GPU, in N."""
TUNED = Arm("base:tuned", ARMS["base"].build, changes=("tuned rate",))


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    scale: str = "quick"
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ("base", "hybrid")
    device: str = "cpu"
    data: Path | None = None
    budgets: tuple[float, ...] = BUDGETS
    step_scale: float = 1.0
    """Multiplies every case's steps; for smoke tests."""
    threads: int = 1
    """CPU threads of torch in each process."""


@dataclass
class CaseResult:
    """All runs of one case, or why there are none."""

    case: str
    family: str
    mode: str
    headline: float
    clock: Clock = "wall"
    """Which time speed is judged by: process time on a CPU, which others may share."""
    skipped: str = ""
    runs: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Runs that were planned and not made, in words."""
    errors: list[str] = field(default_factory=list)
    """Jobs that broke outside of any arm, with the last line of their trace."""

    def of(self, arm: str, fraction: float) -> list[Run]:
        """Runs of an arm at one length, by seed."""
        chosen = [r for r in self.runs if r.arm == arm and r.fraction == fraction]
        return sorted(chosen, key=lambda r: r.seed)

    @classmethod
    def empty(cls, case: Case, options: Options) -> CaseResult:
        """The case before its first run."""
        clock: Clock = "process" if options.device == "cpu" else "wall"
        return cls(case.name, case.family, case.mode, case.headline, clock)


@dataclass(frozen=True)
class Planned:
    """One run of a case that the options ask for."""

    arm: Arm
    fraction: float
    steps: int
    tuned: bool = False


def planned(case: Case, options: Options) -> list[Planned]:
    """Every run that one seed of a case is made of, in the order they are made.

    The base comes first, since its curve is what the others are judged by, then
    hybridopt, then peers, then ablations: what an interruption loses is what matters
    least.
    """
    scale: Any = options.scale
    arms = [ARMS[name] for name in options.arms if name != "base"]
    runs: list[Planned] = []

    def add(
        arm: Arm, fraction: float, factor: float = 1.0, tuned: bool = False
    ) -> None:
        scheduled = case.setup(scale, fraction).steps
        steps = round(factor * max(4, round(scheduled * options.step_scale)))
        runs.append(Planned(arm, fraction, steps, tuned))

    target = case.mode == "target"
    for fraction in (1.0,) if target else options.budgets:
        add(ARMS["base"], fraction)
    patience = TARGET_PATIENCE if target else 1.0
    for fraction in (1.0,) if target else case.fractions:
        if case.rates[scale] != case.tuned[scale]:
            add(TUNED, fraction, patience, tuned=True)
        for arm in arms:
            fits = target or not arm.full_batch_only
            if fits and (fraction == case.headline or not arm.headline_only):
                add(arm, fraction, patience)
    # Hybridopt before peers before ablations; the sort is stable.
    return sorted(runs, key=lambda p: p.arm.rank)


def runs_of(case: Case, options: Options, seed: int) -> Iterator[Run]:
    """Make the runs of one seed of a case, one after the other in this process.

    Raises:
        TaskUnavailableError: Data or a package is missing.
    """
    for item in _warm_ups(case, options):
        _one(case, options, seed, item, Limits(evaluations=1))
    pacer = _pacer(case, options, seed)
    best = -math.inf
    for item in planned(case, options):
        # Judged by where it ends.
        limits = Limits(evaluations=1)
        if case.mode == "target":
            limits = Limits(growth=TARGET_GROWTH)
            if item.arm.name != "base":
                limits = replace(limits, max_cost=item.steps, target_loss=best)
        finished = _one(case, options, seed, item, limits, pacer)
        if case.mode == "target":
            if item.arm.name == "base":
                best = min((p.loss for p in finished.points), default=best)
            finished.note_target(best)
        yield finished


def _warm_ups(case: Case, options: Options) -> Iterator[Planned]:
    """Runs that are not kept, so that the first timed one does not pay for what comes
    once per process or machine: lazy initialization, caches, and on a GPU the kernels
    that hybridopt compiles at first use and keeps on disk.
    """
    plan = planned(case, options)
    yield replace(plan[0], steps=3)
    if options.device == "cpu":
        return
    hybrids = [item for item in plan if item.arm.name.startswith("hybrid")]
    # Long enough for every kind of move.
    for item in hybrids[:1]:
        scale: Any = options.scale
        steps = WARM_UP_SHARE * options.step_scale * case.steps[scale]
        yield replace(item, steps=max(4, round(steps)))


def _pacer(case: Case, options: Options, seed: int) -> Pacer:
    """Bare steps between those of the runs."""
    bases = [item for item in planned(case, options) if item.arm is ARMS["base"]]
    # The case's own length, or the closest to it.
    item = min(bases, key=lambda item: abs(math.log(item.fraction)))
    return Pacer(partial(_setting, case, options, seed, item))


def _setting(
    case: Case, options: Options, seed: int, item: Planned
) -> tuple[Task, Setup]:
    """The task from its beginning, and what the run is asked to do."""
    scale: Any = options.scale
    setup = case.setup(scale, item.fraction, tuned=item.tuned)
    task = case.make(Setting(seed, scale, options.device, options.data))
    return task, replace(setup, steps=item.steps)


def _one(
    case: Case,
    options: Options,
    seed: int,
    item: Planned,
    limits: Limits,
    pacer: Pacer | None = None,
) -> Run:
    task, setup = _setting(case, options, seed, item)
    account = Run(case.name, item.arm.name, seed, item.fraction, item.steps, setup.lr)
    return run(task, item.arm, setup, account, limits, pacer)
