"""Runs the cases: every arm, budget and seed, paired, in one process."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.arms import ARMS, Arm
from benchmarks.cases import BUDGETS, Case
from benchmarks.runner import Limits, Run, run
from benchmarks.tasks.base import Setting, TaskUnavailableError

__all__ = ["CaseResult", "Clock", "Options", "provenance", "run_case"]

Clock = Literal["wall", "process"]

TARGET_GROWTH = 0.03
TARGET_PATIENCE = 2.0
"""In target mode arms get this many times the base's steps to reach its loss."""


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

    def of(self, arm: str, fraction: float) -> list[Run]:
        """Runs of an arm at one length, by seed."""
        chosen = [r for r in self.runs if r.arm == arm and r.fraction == fraction]
        return sorted(chosen, key=lambda r: r.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "runs": [r.to_dict() for r in self.runs]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseResult:
        """Back from plain values."""
        return cls(**{**values, "runs": [Run.from_dict(r) for r in values["runs"]]})


def run_case(
    case: Case, options: Options, report: Callable[[Run], None] = lambda _: None
) -> CaseResult:
    """Run one case; ``report`` is told of every finished run.

    Seeds are the outer loop, so that a slow minute of the machine falls on all arms of
    a seed. A case whose data or package is missing is skipped with its message.
    """
    clock: Clock = "process" if options.device == "cpu" else "wall"
    result = CaseResult(case.name, case.family, case.mode, case.headline, clock)
    worker = _Worker(case, options)
    try:
        worker.warm_up()
        for seed in options.seeds:
            jobs = worker.target if case.mode == "target" else worker.schedule
            for finished in jobs(seed):
                result.runs.append(finished)
                report(finished)
    except TaskUnavailableError as missing:
        result.skipped = str(missing)
    return result


class _Worker:
    """One case's jobs under one set of options."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.arms = [ARMS[name] for name in options.arms if name != "base"]

    def warm_up(self) -> None:
        """Build the task and make a few steps, so that the first timed run does not pay
        for lazy initialization and caches.
        """
        self._run(ARMS["base"], 0, 0.0, Limits(evaluations=1), steps=3)

    def schedule(self, seed: int):  # type: ignore[no-untyped-def]
        """The base at every budget, then each arm at the case's lengths."""
        limits = Limits()
        for fraction in self.options.budgets:
            yield self._run(ARMS["base"], seed, fraction, limits)
        for fraction in self.case.fractions:
            yield from self._tuned(seed, fraction, limits)
            for arm in self._eligible(full_batch=False):
                yield self._run(arm, seed, fraction, limits)

    def target(self, seed: int):  # type: ignore[no-untyped-def]
        """The base for N steps, then each arm until it reaches the base's best loss."""
        base = self._run(ARMS["base"], seed, 1.0, Limits(growth=TARGET_GROWTH))
        yield base
        n = base.steps
        best = min((p.loss for p in base.points), default=float("-inf"))
        limits = Limits(
            growth=TARGET_GROWTH, max_cost=TARGET_PATIENCE * n, target_loss=best
        )
        steps = round(TARGET_PATIENCE * n)
        yield from self._tuned(seed, 1.0, limits, steps)
        for arm in self._eligible(full_batch=True):
            yield self._run(arm, seed, 1.0, limits, steps=steps)

    def _eligible(self, *, full_batch: bool) -> list[Arm]:
        return [arm for arm in self.arms if full_batch or not arm.full_batch_only]

    def _tuned(  # type: ignore[no-untyped-def]
        self, seed: int, fraction: float, limits: Limits, steps: int | None = None
    ):
        """The bare base at its tuned rate, where that is not the case's own rate."""
        scale: Any = self.options.scale
        if self.case.rates[scale] == self.case.tuned[scale]:
            return
        arm = Arm("base:tuned", ARMS["base"].build, changes=("tuned rate",))
        yield self._run(arm, seed, fraction, limits, steps=steps, tuned=True)

    def _run(
        self,
        arm: Arm,
        seed: int,
        fraction: float,
        limits: Limits,
        *,
        steps: int | None = None,
        tuned: bool = False,
    ) -> Run:
        options: Any = self.options
        setup = self.case.setup(options.scale, fraction, tuned=tuned)
        steps = steps or max(4, round(setup.steps * options.step_scale))
        setup = type(setup)(
            steps, setup.lr, setup.schedule, setup.base, setup.weight_decay
        )
        setting = Setting(seed, options.scale, options.device, options.data)
        task = self.case.make(setting)
        account = Run(self.case.name, arm.name, seed, fraction, steps, setup.lr)
        return run(task, arm, setup, account, limits)


def provenance(command: Sequence[str], options: Options) -> dict[str, Any]:
    """Command, commit, seeds, hardware and versions, for every result file."""
    # Loaded now, with the commit that is written down, not when its first run begins.
    import hybridopt.optimizer  # noqa: F401

    names = ("torch", "schedulefree", "pytorch_optimizer", "scikit-learn", "msgspec")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "command": " ".join(command),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "seeds": list(options.seeds),
        "scale": options.scale,
        "hardware": hardware(options.device),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def hardware(device: str) -> str:
    """Name of the processor that trains."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with_name = [
        line.split(":", 1)[1].strip()
        for line in _cpu_lines()
        if line.startswith("model name")
    ]
    return with_name[0] if with_name else platform.machine()


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    """Commit of the sources, marked where they were changed since; or 'unknown'."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", "hybridopt", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line() -> list[str]:
    """How this process was started, without paths."""
    return ["python", "-m", "benchmarks", *sys.argv[1:]]
