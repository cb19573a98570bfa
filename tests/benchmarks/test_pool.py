"""Jobs in worker processes: same results, honest ends."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import pool
from benchmarks.cases import CASES
from benchmarks.collecting import Collected, joined
from benchmarks.pool import Event, Job, run_jobs
from benchmarks.progress import Progress, expected_s, ordered
from benchmarks.runner import Run
from benchmarks.suite import CaseResult, Options, planned

TINY = Options(seeds=(0, 1), arms=("base", "ema"), budgets=(0.5, 1.0), step_scale=0.005)
CASE = CASES["control-minimax"]
JOBS = [Job(CASE.name, seed) for seed in TINY.seeds]


def collect(events) -> CaseResult:
    collected = Collected([CASE], TINY, lambda _: None)
    for event in events:
        collected.take(event)
    return collected.finish()[0]


def outcome(result: CaseResult) -> list[tuple[object, ...]]:
    return [(r.arm, r.fraction, r.seed, r.final_loss, r.cost) for r in result.runs]


def test_workers_give_what_one_process_gives():
    alone = collect(run_jobs(JOBS, TINY, 1))
    together = collect(run_jobs(JOBS, TINY, 2))
    assert len(alone.runs) == 6
    assert outcome(alone) == outcome(together)
    assert alone.missing == together.missing == alone.errors == together.errors == []


def test_nothing_starts_after_the_last_minute():
    times = iter([0.0, *[61.0] * 100])
    result = collect(run_jobs(JOBS, TINY, 1, minutes=1.0, clock=lambda: next(times)))
    assert result.runs == []
    assert result.missing == ["seeds 0, 1: not run: everything"]


def test_a_job_that_breaks_leaves_the_others(monkeypatch):
    def broken(case, options, seed):
        if seed == 0:
            raise RuntimeError("torn")
        yield Run(case.name, "base", seed, 1.0, 4, 0.1)

    monkeypatch.setattr(pool, "runs_of", broken)
    result = collect(run_jobs(JOBS, TINY, 1))
    assert [r.seed for r in result.runs] == [1]
    assert result.errors[0].startswith("seed 0: RuntimeError: torn (test_pool.py:")
    assert "seeds 0, 1: not run: base 0.5 N, ema 1 N" in result.missing


def test_order_is_first_seeds_first_and_long_cases_first():
    names = ["smooth-poisson-tuned", "pretrain-wsd", "control-tiny-batch"]
    jobs = ordered(names, Options(seeds=(3, 4)))
    assert [j.seed for j in jobs] == [3, 3, 3, 4, 4, 4]
    lengths = [sum(expected_s(j, Options()).values()) for j in jobs[:3]]
    assert lengths == sorted(lengths, reverse=True)
    assert [j.case for j in jobs[:3]] == [j.case for j in jobs[3:]]


def test_progress_says_how_much_is_left():
    now = [0.0]
    progress = Progress(JOBS, TINY, clock=lambda: now[0])
    assert math.isclose(progress.remaining, progress.total)
    now[0] = 60.0
    for item in planned(CASE, TINY):
        run = Run(CASE.name, item.arm.name, 0, item.fraction, item.steps, 0.1)
        assert "control-minimax seed 0" in progress.take(Event("run", JOBS[0], run))
    progress.take(Event("done", JOBS[0]))
    assert progress.standing() == "1/2 jobs, 50 %, 1.0 min, about 1.0 min left"


def test_ablations_come_last_and_at_the_judged_length_only():
    case = CASES["finetune-3e-5"]
    options = Options(arms=("base", "hybrid:rssm", "ema", "hybrid"))
    names = [(p.arm.name, p.fraction) for p in planned(case, options)]
    assert names[:6] == [("base", b) for b in options.budgets]
    assert names[-1] == ("hybrid:rssm", 0.25)
    assert names.index(("hybrid", 1.0)) < names.index(("ema", 0.25))


def test_results_of_two_files_join_without_doubles():
    def result(seeds: tuple[int, ...], loss: float) -> CaseResult:
        found = CaseResult("case", "controls", "schedule", 1.0)
        for seed in seeds:
            run = Run("case", "base", seed, 1.0, 4, 0.1, final_loss=loss)
            found.runs.append(run)
        return found

    (both,) = joined([[result((0, 1), 1.0)], [result((1, 2), 2.0)]])
    assert [(r.seed, r.final_loss) for r in both.runs] == [(0, 1.0), (1, 1.0), (2, 2.0)]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_terminated_run_leaves_its_results(tmp_path):
    root = Path(__file__).resolve().parents[2]
    words = ["run", "control-minimax", "--arms", "base", "--seeds", "500", "--no-plots"]
    words += ["--step-scale", "0.005", "--budgets", "0.5,1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=root,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline and "seed 0: done" not in process.stderr.readline()
    ):
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    (table,) = tmp_path.glob("*.md")
    text = table.read_text()
    assert "not run: everything" in text
    assert "| base | 1 N |" in text
