"""How far a benchmark is, and how long it will take; on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.cases import CASES
from benchmarks.pool import Event, Job
from benchmarks.suite import Options, planned

__all__ = ["Progress", "expected_s", "ordered", "shown"]


def expected_s(job: Job, options: Options) -> dict[tuple[str, float], float]:
    """Rough seconds per (arm, length) of a job, by the case's step time."""
    case = CASES[job.case]
    return {
        (item.arm.name, item.fraction): item.steps * case.step_s(options.scale)
        for item in planned(case, options)
    }


def ordered(cases: Sequence[str], options: Options) -> list[Job]:
    """Every case's first seed before any second one, longest cases first."""
    jobs = [Job(case, seed) for seed in options.seeds for case in cases]
    length = {case: sum(expected_s(Job(case, 0), options).values()) for case in cases}
    place = {seed: i for i, seed in enumerate(options.seeds)}
    return sorted(jobs, key=lambda j: (place[j.seed], -length[j.case]))


class Progress:
    """Counts expected seconds of work, so that the time left is more than a guess."""

    def __init__(
        self,
        jobs: Sequence[Job],
        options: Options,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left = {job: expected_s(job, options) for job in jobs}
        self.total = sum(sum(left.values()) for left in self._left.values())
        self.done_jobs, self.jobs = 0, len(jobs)
        self._clock, self._started = clock, clock()

    @property
    def remaining(self) -> float:
        """Expected seconds of work, in a single process, that are still to do."""
        return sum(sum(left.values()) for left in self._left.values())

    def take(self, event: Event) -> str:
        """Count an event and say it in one line."""
        job, run = event.job, event.run
        if event.kind == "run" and run is not None:
            self._left.get(job, {}).pop((run.arm, run.fraction), None)
            words = (
                f"{job.case} seed {job.seed} {run.arm} {run.fraction:g} N: "
                f"loss {run.final_loss:.5g}, {run.backwards} backwards, "
                f"{run.process_s:.1f} s"
            )
            return words + (f", FAILED {run.failure}" if run.failure else "")
        self._left.pop(job, None)
        self.done_jobs += 1
        text = f"{job.case} seed {job.seed}: {event.kind}"
        return text + (f" ({event.text})" if event.text else "")

    def standing(self) -> str:
        """Share done, time taken and time left."""
        share = 1.0 - self.remaining / self.total if self.total else 1.0
        spent = self._clock() - self._started
        left = spent * (1.0 - share) / share if share > 0.0 else float("nan")
        eta = f", about {left / 60:.1f} min left" if left == left else ""
        jobs = f"{self.done_jobs}/{self.jobs} jobs"
        return f"{jobs}, {100 * share:.0f} %, {spent / 60:.1f} min{eta}"


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[Callable[[Event], None]]:
    """A function that shows each event: a bar on a terminal, else plain lines."""
    console = _terminal()
    if console is None:
        yield lambda event: print(
            f"[{progress.standing()}] {progress.take(event)}",
            file=sys.stderr,
            flush=True,
        )
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=max(progress.total, 1e-9))

        def show(event: Event) -> None:
            line = progress.take(event)
            if event.kind != "run" or (event.run is not None and event.run.failure):
                bar.console.print(line, highlight=False)
            bar.update(
                task,
                completed=progress.total - progress.remaining,
                description=f"{progress.standing()}  {line[:60]}",
            )

        yield show


def _terminal():  # type: ignore[no-untyped-def]
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=True)
