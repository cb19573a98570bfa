"""Gathers the events of a run into results that do not depend on their order."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from benchmarks.arms import ARMS
from benchmarks.cases import Case
from benchmarks.pool import Event
from benchmarks.runner import Run
from benchmarks.suite import CaseResult, Options, planned

__all__ = ["Collected", "joined"]

SAVE_INTERVAL_S = 10.0
_ORDER = {name: i for i, name in enumerate(("base", "base:tuned", *ARMS))}


class Collected:
    """All results so far; saved now and then, so that even a kill loses little.

    Args:
        cases: In the order of the result.
        options: What every case was asked for.
        save: Writes the results.
        kept: Results to begin with, of some of the cases.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        options: Options,
        save: Callable[[list[CaseResult]], None],
        kept: Sequence[CaseResult] = (),
    ) -> None:
        self._cases, self._options, self._save = cases, options, save
        self._results = {case.name: CaseResult.empty(case, options) for case in cases}
        self._results |= {result.case: result for result in kept}
        self._saved = time.monotonic()

    def take(self, event: Event) -> None:
        """Add one event's content."""
        result = self._results[event.job.case]
        if event.run is not None:
            result.runs.append(event.run)
        elif event.kind == "skipped":
            result.skipped = event.text
        elif event.kind == "error":
            result.errors.append(event.text)
        if time.monotonic() - self._saved > SAVE_INTERVAL_S:
            self._save(self.finish())
            self._saved = time.monotonic()

    def finish(self) -> list[CaseResult]:
        """The results in their final order, with what is missing in words."""
        for case in self._cases:
            result = self._results[case.name]
            result.runs.sort(key=_place)
            result.errors.sort()
            result.missing = [] if result.skipped else self._missing(case, result)
        return list(self._results.values())

    def _missing(self, case: Case, result: CaseResult) -> list[str]:
        made = {(r.arm, r.fraction, r.seed) for r in result.runs}
        lost: dict[tuple[int, ...], list[str]] = {}
        plan = planned(case, self._options)
        for item in plan:
            seeds = tuple(
                seed
                for seed in self._options.seeds
                if (item.arm.name, item.fraction, seed) not in made
            )
            if seeds:
                lost.setdefault(seeds, []).append(
                    f"{item.arm.name} {item.fraction:g} N"
                )
        return [
            f"seeds {', '.join(map(str, seeds))}: not run: "
            + ("everything" if len(names) == len(plan) else ", ".join(names))
            for seeds, names in lost.items()
        ]


_GAP = re.compile(r"seeds ([\d, ]+): not run: (.+)")


def _left(gap: str, runs: Sequence[Run]) -> list[str]:
    """Of a gap in words, as ``Collected`` writes it, what the runs do not fill."""
    found = _GAP.fullmatch(gap)
    if found is None:
        return [gap]
    made = {(r.seed, f"{r.arm} {r.fraction:g} N") for r in runs}
    begun = {(r.seed, "everything") for r in runs}
    names = found[2].split(", ")
    lines: dict[str, list[str]] = {}
    for seed in found[1].split(", "):
        missing = [n for n in names if (int(seed), n) not in made | begun]
        if missing:
            lines.setdefault(", ".join(missing), []).append(seed)
    return [
        f"seeds {', '.join(seeds)}: not run: {names}" for names, seeds in lines.items()
    ]


def _place(r: Run) -> tuple[int, int, float]:
    return (r.seed, _ORDER.get(r.arm, len(_ORDER)), r.fraction)


def joined(groups: Sequence[Sequence[CaseResult]]) -> list[CaseResult]:
    """Results of several files; runs that two files have count once, the first file's.

    Raises:
        ValueError: Two files judge a case differently.
    """
    found: dict[str, CaseResult] = {}
    for result in (r for group in groups for r in group):
        first = found.setdefault(result.case, result)
        if first is result:
            continue
        if (first.mode, first.headline) != (result.mode, result.headline):
            raise ValueError(f"{result.case}: the files judge it differently.")
        if len({r.paced for r in (*first.runs, *result.runs)}) > 1:
            raise ValueError(
                f"{result.case}: one file counts its time in bare steps, another in "
                "seconds: they do not compare. Report them apart."
            )
        made = {(r.arm, r.fraction, r.seed) for r in first.runs}
        extra = [r for r in result.runs if (r.arm, r.fraction, r.seed) not in made]
        first.runs = sorted([*first.runs, *extra], key=_place)
        made |= {(r.arm, r.fraction, r.seed) for r in extra}
        gaps = dict.fromkeys([*first.missing, *result.missing])
        left = [gap for text in gaps for gap in _left(text, first.runs)]
        first.missing = list(dict.fromkeys(left))
        first.errors = list(dict.fromkeys([*first.errors, *result.errors]))
        first.skipped = first.skipped if result.skipped else ""
    return list(found.values())
