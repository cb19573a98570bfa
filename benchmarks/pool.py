"""Jobs in worker processes, results as they come, and an end that loses little.

One job is one seed of one case: all its arms run one after the other in one process, so
their times are comparable. Results are collected per run, not per job.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from benchmarks.allocator import keep_freed_memory
from benchmarks.cases import CASES
from benchmarks.runner import Run
from benchmarks.suite import Options, runs_of
from benchmarks.tasks.base import TaskUnavailableError

__all__ = ["Event", "Interrupted", "Job", "interruptible", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """One seed of one case."""

    case: str
    seed: int


@dataclass(frozen=True)
class Event:
    """What became of a job, or of one run in it."""

    kind: Literal["run", "done", "cut", "skipped", "error"]
    """cut: told to stop before its last run."""
    job: Job
    run: Run | None = None
    text: str = ""


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C; not an Exception, so that no arm's failure swallows it."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into ``Interrupted`` for the block."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(
    jobs: Sequence[Job],
    options: Options,
    workers: int,
    *,
    minutes: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """Run the jobs and yield what they report.

    Args:
        jobs: In the order they are started.
        options: The same for all.
        workers: Processes; 1 runs everything in this one.
        minutes: No run is started later than this. Runs under way then may take a
            quarter as long again; what is not done by then is stopped and lost.
        clock: Seconds; for tests.
    """
    deadline = None if minutes is None else clock() + 60.0 * minutes
    if workers == 1:
        yield from _serial(jobs, options, deadline, clock)
    else:
        yield from _parallel(jobs, options, workers, deadline, minutes or 0.0, clock)


def _reports(
    job: Job, options: Options, stopped: Callable[[], bool]
) -> Iterator[Event]:
    """Run one job, turning whatever happens into events."""
    try:
        for finished in runs_of(CASES[job.case], options, job.seed):
            yield Event("run", job, finished)
            if stopped():
                yield Event("cut", job)
                return
        yield Event("done", job)
    except TaskUnavailableError as missing:
        yield Event("skipped", job, text=str(missing))
    except Exception as wrong:
        last = traceback.extract_tb(wrong.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        text = f"seed {job.seed}: {type(wrong).__name__}: {wrong} ({place})"
        yield Event("error", job, text=text)


def _serial(
    jobs: Sequence[Job],
    options: Options,
    deadline: float | None,
    clock: Callable[[], float],
) -> Iterator[Event]:
    keep_freed_memory()

    def late() -> bool:
        return deadline is not None and clock() >= deadline

    for job in jobs:
        if late():
            yield Event("cut", job)
        else:
            yield from _reports(job, options, late)


def _serve(pipe: Connection, options: Options, stop: Any) -> None:
    """A worker's whole life: take a job, report on it, until there is none."""
    # The parent decides when to end; a Ctrl-C in the terminal reaches every process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    while (job := pipe.recv()) is not None:
        for event in _reports(job, options, stop.is_set):
            pipe.send(event)


class _Worker:
    """One process and the job that it has."""

    def __init__(self, context: Any, options: Options, stop: Any) -> None:
        self.pipe, far = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(far, options, stop), daemon=True
        )
        self.process.start()
        far.close()
        self.job: Job | None = None

    def give(self, job: Job | None) -> None:
        self.job = job
        with contextlib.suppress(OSError):
            self.pipe.send(job)

    def event(self) -> Event:
        """The next report; a process that died is one too."""
        assert self.job is not None
        try:
            found: Event = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5.0)
            text = f"seed {self.job.seed}: worker died, exit {self.process.exitcode}"
            found = Event("error", self.job, text=text)
        return found

    def end(self) -> None:
        self.process.join(5.0)
        self.pipe.close()


def _parallel(
    jobs: Sequence[Job],
    options: Options,
    workers: int,
    deadline: float | None,
    minutes: float,
    clock: Callable[[], float],
) -> Iterator[Event]:
    # A fork would copy this process's threads and CUDA context half-alive.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    waiting = list(reversed(jobs))
    count = min(workers, len(jobs))
    pool = [_Worker(context, options, stop) for _ in range(count)]
    try:
        for worker in pool:
            worker.give(waiting.pop())
        while busy := {w.pipe: w for w in pool if w.job is not None}:
            if deadline is not None and clock() >= deadline:
                stop.set()
                while waiting:
                    yield Event("cut", waiting.pop())
                if clock() >= deadline + 15.0 * minutes:
                    yield from (Event("cut", w.job) for w in busy.values() if w.job)
                    return
            for pipe in wait(list(busy), timeout=0.5):
                worker = busy[pipe]  # type: ignore[index]
                event = worker.event()
                yield event
                if event.kind == "run":
                    continue
                if not worker.process.is_alive():
                    pool.remove(worker)
                    worker = _Worker(context, options, stop)
                    pool.append(worker)
                worker.give(waiting.pop() if waiting else None)
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.end()
