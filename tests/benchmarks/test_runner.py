"""Counting, pairing, clocks, and what a run writes down."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks.arms import ARMS, Arm, Setup, Stepper
from benchmarks.batchnorm import recalibrated
from benchmarks.counting import Meter, live_tensor_bytes
from benchmarks.runner import Limits, Point, Run, evaluation_steps, run
from benchmarks.schedules import factor
from benchmarks.tasks.base import BatchTask

SETUP = Setup(steps=12, lr=0.01, schedule="constant")


def make_task(seen: list[int] | None = None, *, full: bool = False) -> BatchTask[int]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x = torch.randn(64, 3)

    def batch(index: int) -> int:
        if seen is not None:
            seen.append(index)
        return index

    def loss(index: int) -> Tensor:
        rows = x if full else x[index % 64]
        return (model(rows) - 1.0).square().mean()

    @torch.no_grad()
    def evaluate() -> float:
        return float((model(x) - 1.0).square().mean())

    return BatchTask(model, loss, batch, evaluate)


def account(arm: str = "fake") -> Run:
    return Run("case", arm, seed=0, fraction=1.0, steps=12, lr=0.01)


class EveryThird:
    """Runs a real step two times in three, and one validation among them."""

    def __init__(self, model: nn.Module) -> None:
        self.base = torch.optim.SGD(model.parameters(), lr=0.01)
        self.calls = 0

    def step(self, closure) -> None:
        self.calls += 1
        if self.calls % 3 == 0:
            with torch.no_grad():
                closure()
            return
        self.base.zero_grad()
        closure().backward()
        self.base.step()

    def statistics(self):
        return {"bookkeeping_s": 0.25, "kernels": "torch", "nested": {"a": 1}}


FAKE = Arm("fake", lambda model, meter, _: forward_stepper(EveryThird(model), meter))


def forward_stepper(optimizer, meter: Meter) -> Stepper:
    return Stepper(optimizer, meter, takes_forward=True)


def test_run_counts_a_fake_arm_exactly():
    result = run(make_task(), FAKE, SETUP, account(), Limits(evaluations=3))
    assert (result.forwards, result.backwards, result.validations) == (12, 8, 4)
    assert result.cost == pytest.approx(8 + 4 / 3)
    assert [p.step for p in result.points] == [0, 4, 8, 12]
    assert result.final_loss == result.points[-1].loss < result.points[0].loss
    assert result.bookkeeping_share == pytest.approx(0.25 / result.wall_s)
    assert result.failure == ""


def test_real_steps_of_every_arm_see_the_same_batches():
    seen_base: list[int] = []
    seen_fake: list[int] = []
    run(make_task(seen_base), ARMS["base"], SETUP, account("base"), Limits())
    run(make_task(seen_fake), FAKE, SETUP, account(), Limits())
    # What lies beyond is the training objective's.
    seen_base, seen_fake = (
        [i for i in seen if i < BatchTask.OBJECTIVE_START]
        for seen in (seen_base, seen_fake)
    )
    assert seen_base == list(range(12))
    # A validation peeks at the next batch and leaves it for the real step.
    assert seen_fake == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8]


def test_evaluations_are_outside_the_clock():
    task = make_task()
    plain = task.evaluate

    def slow() -> float:
        time.sleep(0.05)
        return plain()

    task.evaluate = slow
    result = run(task, ARMS["base"], SETUP, account(), Limits(evaluations=6))
    assert len(result.points) == 7
    assert result.wall_s < 0.2
    assert [p.wall_s for p in result.points] == sorted(p.wall_s for p in result.points)


def test_limits_end_a_run_early():
    capped = run(make_task(), ARMS["base"], SETUP, account(), Limits(max_cost=5.0))
    assert capped.cost == pytest.approx(5.0)
    start = run(make_task(), ARMS["base"], SETUP, account(), Limits()).points[0].loss
    reached = run(
        make_task(),
        ARMS["base"],
        SETUP,
        account(),
        Limits(12, target_loss=start * 0.99),
    )
    assert 0 < reached.backwards < 12
    assert reached.final_loss <= start * 0.99


def test_failure_of_an_arm_is_recorded_with_what_was_spent():
    class Breaks(EveryThird):
        def step(self, closure) -> None:
            super().step(closure)
            if self.calls == 5:
                raise RuntimeError("broke")

    arm = Arm("breaks", lambda model, meter, _: forward_stepper(Breaks(model), meter))
    result = run(make_task(), arm, SETUP, account(), Limits(evaluations=12))
    assert result.failure == "RuntimeError: broke"
    assert math.isnan(result.final_loss)
    assert (result.forwards, result.points[-1].step) == (5, 4)


@pytest.mark.parametrize(
    "name",
    ["base", "ema", "lookahead", "snoo", "ema-nesterov", "extrapolation",
     "hypergradient", "hypergradient:tensor", "schedule-free", "prodigy", "lbfgs"],
)  # fmt: skip
def test_every_arm_trains_and_is_counted(name):
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    if name == "prodigy":
        pytest.importorskip("pytorch_optimizer")
    task = make_task(full=name == "lbfgs")
    result = run(task, ARMS[name], SETUP, account(name), Limits())
    assert result.failure == ""
    assert result.validations == 0
    if name == "lbfgs":
        # A line search takes several evaluations, until the problem is solved.
        assert result.points[-1].loss < 0.5 * result.points[0].loss
    else:
        assert result.backwards == 12
    assert math.isfinite(result.final_loss)


def test_repeated_runs_are_identical():
    first = run(make_task(), FAKE, SETUP, account(), Limits())
    second = run(make_task(), FAKE, SETUP, account(), Limits())
    assert [p.loss for p in first.points] == [p.loss for p in second.points]


def test_target_is_reached_between_two_points():
    made = account()
    made.points = [
        Point(0, 0.0, 0.0, 0.0, 4.0),
        Point(10, 10.0, 1.0, 2.0, 3.0),
        Point(40, 40.0, 4.0, 8.0, 2.0),
    ]
    made.note_target(2.5)
    assert made.reached == [pytest.approx(20.0), pytest.approx(2.0), pytest.approx(4.0)]
    made.note_target(1.0)
    assert made.reached is None


def test_objective_is_the_training_loss_and_changes_nothing():
    task = make_task()
    before = [p.detach().clone() for p in task.model.parameters()]
    value = task.objective()
    assert value == task.objective() > 0.0
    assert task.index == 0
    assert all(
        torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True)
    )
    result = run(task, ARMS["base"], SETUP, account("base"), Limits())
    assert result.objective == pytest.approx(task.objective())
    assert result.objective < value


def test_averaged_weights_get_batch_statistics_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(640, 3)

    def loss(rows: Tensor) -> Tensor:
        return model(rows).square().mean()

    task = BatchTask(model, loss, lambda i: x[i % 10 * 64 :][:64], lambda: 0.0)
    task.closure()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with recalibrated(task):
        hidden = model[0](torch.cat([task.batch(i) for i in range(16)]))
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0).detach())
    assert model.training
    assert model[1].momentum == 0.1
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_evaluation_steps_end_at_the_last_and_grow_on_request():
    assert evaluation_steps(100, Limits(evaluations=4)) == [25, 50, 75, 100]
    assert evaluation_steps(3, Limits(evaluations=8)) == [1, 2, 3]
    grown = evaluation_steps(4000, Limits(growth=0.03))
    assert grown[-1] == 4000
    assert grown == sorted(set(grown))
    ratios = [b / a for a, b in pairwise(grown) if a > 50]
    assert max(ratios) < 1.05


def test_live_bytes_count_each_storage_once():
    before = live_tensor_bytes()
    held = torch.zeros(1000)
    views = [held[:10], held.view(10, 100)]
    assert live_tensor_bytes() - before == 4000
    assert len(views) == 2


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_schedules_stay_positive_and_reach_one(schedule, steps):
    values = [factor(schedule, steps)(t) for t in range(steps + 1)]
    assert all(0.0 < v <= 1.0 for v in values)
    assert max(values) == pytest.approx(1.0, abs=1e-2) or steps < 20
    assert values[-1] == values[-2]


def test_wsd_warms_up_holds_and_decays():
    value = factor("wsd", 100)
    assert value(0) == pytest.approx(0.2)
    assert value(4) == value(50) == value(75) == 1.0
    assert value(99) == pytest.approx(1 / 25)
