"""Bare steps between those of a run: counted, paired in time, and without a trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks import suite
from benchmarks.arms import ARMS, Setup
from benchmarks.cases import CASES
from benchmarks.collecting import joined
from benchmarks.pacing import EVERY_S, Pacer
from benchmarks.runner import Limits, Point, Run, run
from benchmarks.suite import CaseResult, Options
from benchmarks.tasks.base import BatchTask

SETUP = Setup(steps=12, lr=0.01, schedule="constant")


def noisy_task() -> BatchTask[int]:
    """Draws from the process's own random stream at every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        x = torch.randn(64, 3)

    def loss(index: int) -> Tensor:
        return (model(x + torch.randn_like(x)) - 1.0).square().mean()

    return BatchTask(model, loss, lambda index: index, lambda: float(loss(0).detach()))


class Clock:
    """Goes on by a fixed time whenever it is asked."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def account(**values) -> Run:
    return Run("case", "base", seed=0, fraction=1.0, steps=12, lr=0.01, **values)


def test_a_block_takes_its_share_and_does_not_count_its_first_step():
    made = []

    def make():
        made.append(noisy_task())
        return made[-1], Setup(steps=100, lr=0.01, schedule="constant")

    clock = Clock(tick=0.0)
    pacer = Pacer(make, clock)
    assert not pacer.due
    clock.now += EVERY_S
    assert pacer.due
    clock.tick = 0.01
    pacer.block()
    # A fifth of the time since the last block, one tick per step.
    assert pacer.steps == pytest.approx(0.2 * EVERY_S / 0.01, abs=2)
    # One step made the state, one refilled the caches.
    assert made[0].index == pacer.steps + 2
    assert pacer.step_wall_s > 0.0
    assert pacer.step_process_s > 0.0
    pacer.begin()
    assert math.isnan(pacer.step_wall_s)


def test_the_task_begins_again_behind_its_last_step():
    made = []

    def make():
        made.append(noisy_task())
        return made[-1], SETUP

    pacer = Pacer(make)
    for _ in range(40):
        pacer.block()
    assert len(made) > 3
    assert all(task.index <= SETUP.steps for task in made)
    assert pacer.steps >= 40


def test_pacing_leaves_no_trace_in_the_run():
    def losses(pacer: Pacer | None) -> list[float]:
        done = run(
            noisy_task(), ARMS["base"], SETUP, account(), Limits(evaluations=4), pacer
        )
        assert done.failure == ""
        return [p.loss for p in done.points]

    clock = Clock(tick=EVERY_S)  # a block every few steps
    pacer = Pacer(lambda: (noisy_task(), SETUP), clock)
    assert losses(pacer) == losses(None)
    assert pacer.steps >= 4


def test_times_are_counted_in_bare_steps():
    paced = account(
        cost=8.0, wall_s=6.0, process_s=5.0, pace_wall_s=0.5, pace_process_s=0.25
    )
    assert paced.amounts(paced) == (8.0, 12.0, 20.0)
    assert not account().paced
    assert account(wall_s=3.0).amounts(Point(1, 2.0, 3.0, 4.0, 0.1)) == (2.0, 3.0, 4.0)
    paced.points = [Point(0, 0.0, 0.0, 0.0, 2.0), Point(8, 8.0, 6.0, 5.0, 1.0)]
    paced.note_target(1.0)
    assert paced.reached == [8.0, 12.0, 20.0]


def test_a_run_of_the_suite_is_paced_on_a_cpu():
    options = Options(arms=("base",), budgets=(1.0,), step_scale=0.02)
    (finished,) = suite.runs_of(CASES["control-minimax"], options, 0)
    assert finished.paced
    assert finished.amounts(finished)[1] == finished.wall_s / finished.pace_wall_s


def test_seconds_and_bare_steps_are_not_joined():
    def result(run: Run) -> list[CaseResult]:
        return [CaseResult("case", "controls", "schedule", 1.0, runs=[run])]

    paced = account(pace_wall_s=1.0, pace_process_s=1.0)
    assert joined([result(paced), result(paced)])[0].runs == [paced]
    with pytest.raises(ValueError, match="bare steps"):
        joined([result(paced), result(account())])


def test_a_gap_that_another_file_fills_is_none():
    def result(seed: int, arm: str, *missing: str) -> list[CaseResult]:
        made = Run("case", arm, seed=seed, fraction=1.0, steps=12, lr=0.01)
        found = CaseResult("case", "controls", "schedule", 1.0, runs=[made])
        found.missing = list(missing)
        return [found]

    first = result(0, "base", "seeds 1, 2: not run: base 1 N, hybrid 1 N", "in words")
    second = result(1, "base", "seeds 1: not run: hybrid 1 N")
    third = result(2, "hybrid", "seeds 2: not run: everything")
    assert joined([first, second, third])[0].missing == [
        "seeds 1: not run: hybrid 1 N",
        "seeds 2: not run: base 1 N",
        "in words",
    ]


def test_kernels_are_compiled_off_the_clock_on_a_gpu():
    case = CASES["finetune-3e-5"]
    arms = ("base", "hybrid", "prodigy")
    on_gpu = Options(scale="gpu", device="cuda", arms=arms)
    warm_ups = [(p.arm.name, p.steps) for p in suite._warm_ups(case, on_gpu)]
    assert warm_ups == [("base", 3), ("hybrid", case.steps["gpu"] // 4)]
    on_cpu = Options(arms=arms)
    assert [p.arm.name for p in suite._warm_ups(case, on_cpu)] == ["base"]
