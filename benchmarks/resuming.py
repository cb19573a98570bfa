"""Going on with a run that was cut: what its file holds is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.pool import Job
from benchmarks.store import load
from benchmarks.suite import CaseResult, Options, planned

__all__ = ["resumed", "waiting"]

_ALIKE = ("commit", "scale", "hardware", "threads", "memory", "versions")
"""What must be as it was: one table is of one version, its times of one machine."""


def resumed(
    path: Path, meta: dict[str, Any], cases: Sequence[Case], options: Options
) -> tuple[dict[str, Any], list[CaseResult]]:
    """The file's provenance, with one more sitting, and the seeds that it completed.

    A seed that was cut half-way is left out: its arms have to run in one process, one
    after the other, so that their times compare.

    Args:
        path: JSON results of the run that was cut.
        meta: Provenance of this run.
        cases: Those asked for.
        options: Those asked for.

    Raises:
        ValueError: The file is of another version, machine or set of packages.
    """
    before, results = load(path)
    for key in _ALIKE:
        if before.get(key) != meta[key]:
            raise ValueError(
                f"--resume {path}: it has {key} {before.get(key)!r}, this run "
                f"{meta[key]!r}: must be the same. Run without --resume, and join the "
                "files with report."
            )
    known = {case.name: case for case in cases}
    kept = [
        _completed(result, known[result.case], options)
        for result in results
        if result.case in known
    ]
    sittings = int(before.get("sittings", 1)) + 1
    return {**before, "seeds": meta["seeds"], "sittings": sittings}, kept


def waiting(jobs: Sequence[Job], kept: Sequence[CaseResult]) -> list[Job]:
    """The jobs that ``kept`` does not hold, in their order."""
    done = {Job(r.case, run.seed) for r in kept for run in r.runs}
    return [job for job in jobs if job not in done]


def _completed(result: CaseResult, case: Case, options: Options) -> CaseResult:
    plan = {(item.arm.name, item.fraction) for item in planned(case, options)}
    whole = {
        seed
        for seed in options.seeds
        if plan <= {(r.arm, r.fraction) for r in result.runs if r.seed == seed}
    }
    runs = [r for r in result.runs if r.seed in whole and (r.arm, r.fraction) in plan]
    # What was in the way then may be gone by now.
    return replace(result, runs=runs, skipped="", errors=[], missing=[])
