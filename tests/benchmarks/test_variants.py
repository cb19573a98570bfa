"""Ablation arms: what they change, and that watching changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.arms import ABLATIONS, ARMS, Setup
from benchmarks.calibration import LEVELS, Watch, merged
from benchmarks.counting import Meter
from benchmarks.moments import MomentsAfterMove
from benchmarks.runner import Limits, Run, run
from benchmarks.tasks.base import BatchTask
from hybridopt import HybridPredictOptimizer

SETUP = Setup(steps=40, lr=1e-3, schedule="constant")


def make_task() -> BatchTask[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(256, 6)
    y = x[:, :1] * 2 - x[:, 1:2]

    def loss(rows: Tensor) -> Tensor:
        return (model(x[rows]) - y[rows]).square().mean()

    def batch(i: int) -> Tensor:
        return (torch.arange(32) + 32 * i) % 256

    @torch.no_grad()
    def evaluate() -> float:
        return float((model(x) - y).square().mean())

    return BatchTask(model, loss, batch, evaluate)


def made(name: str) -> Run:
    account = Run("case", name, seed=0, fraction=1.0, steps=40, lr=1e-3)
    return run(make_task(), ARMS[name], SETUP, account, Limits(evaluations=2))


def ended(name: str) -> list[float]:
    """The first parameter's weights that an arm ends at."""
    task = make_task()
    stepper = ARMS[name].build(task.model, Meter(task.closure, task.advance), SETUP)
    for _ in range(40):
        stepper.step()
    return next(task.model.parameters()).detach().flatten().tolist()


@pytest.mark.parametrize("name", ["hybrid", *(arm.name for arm in ABLATIONS)])
def test_every_variant_trains(name):
    result = made(name)
    assert result.failure == ""
    assert result.final_loss < result.points[0].loss
    assert result.statistics["steps"] == 40


def test_parts_that_are_off_do_nothing():
    assert made("hybrid:folded-only").statistics["predicted_steps"] == 0
    assert made("hybrid:folded-only").backwards == 40
    bare = ended("base")
    # Without gains, and too short for a drift window, only the base moves.
    assert ended("hybrid:no-gains") == pytest.approx(bare)
    assert ended("hybrid") != pytest.approx(bare)


def test_the_default_is_judged_at_its_evaluation_weights():
    losses = [
        made(name).final_loss for name in ("hybrid:own-weights", "hybrid", "hybrid:ema")
    ]
    # Forty steps downhill: an average lags behind.
    assert losses == sorted(set(losses))


def trained(wrap, steps: int = 40) -> tuple[HybridPredictOptimizer, list[Tensor]]:
    task = make_task()
    base = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    hybrid = HybridPredictOptimizer(base, model=task.model)
    stepper = wrap(hybrid)
    for i in range(steps):
        stepper.step(lambda i=i: task.loss(task.batch(i)))
    return stepper, [p.detach().clone() for p in task.model.parameters()]


def test_watching_changes_nothing_and_counts_every_forecast():
    _, plain = trained(lambda hybrid: hybrid)
    watch, watched = trained(Watch)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    notes = watch.calibration()
    count, *within = notes["loss"]
    assert within == sorted(within)
    assert 0 < count <= 40
    assert within[-1] <= count
    moves = sum(row[0] for row in notes["progress"])
    assert moves == sum(row[0] for row in notes["confidence"]) > 0


def test_merging_adds_up():
    watch, _ = trained(Watch)
    notes = watch.calibration()
    twice = merged([notes, {}, notes])
    assert twice is not None
    assert twice["loss"] == [2 * n for n in notes["loss"]]
    assert twice["progress"][3] == [2 * v for v in notes["progress"][3]]
    assert merged([{}]) is None
    assert len(notes["loss"]) == 1 + len(LEVELS)


class Fake:
    """Stands where the hybrid stands, with a move of two steps behind each step."""

    def __init__(self) -> None:
        from types import SimpleNamespace as Record

        self.p = nn.Parameter(torch.ones(2))
        self.p.grad = torch.full((2,), 3.0)
        self.state = {
            self.p: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)},
        }
        self.param_groups = [{"params": [self.p], "betas": (0.5, 0.8)}]
        self.last_step = Record(
            mover=Record(value="gain"), loss_predicted=False, progress=2.0
        )

    def step(self, closure: object) -> None:
        pass


def test_moments_shrink_as_if_steps_had_passed():
    fake = Fake()
    MomentsAfterMove(fake, "shrink").step(None)
    torch.testing.assert_close(fake.state[fake.p]["exp_avg"], torch.full((2,), 0.25))
    assert torch.equal(fake.state[fake.p]["exp_avg_sq"], torch.ones(2))


def test_moments_advance_with_the_last_gradient():
    fake = Fake()
    MomentsAfterMove(fake, "advance").step(None)
    state = fake.state[fake.p]
    torch.testing.assert_close(state["exp_avg"], torch.full((2,), 0.25 + 0.75 * 3))
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((2,), 0.64 + 0.36 * 9))
    fake.last_step.loss_predicted = True
    MomentsAfterMove(fake, "advance").step(None)
    torch.testing.assert_close(state["exp_avg"], torch.full((2,), 0.25 + 0.75 * 3))


def test_moments_of_a_real_run_are_changed():
    _, plain = trained(lambda hybrid: hybrid)
    for kind in ("shrink", "advance"):
        _, aged = trained(lambda hybrid, kind=kind: MomentsAfterMove(hybrid, kind))
        same = [torch.equal(a, b) for a, b in zip(plain, aged, strict=True)]
        assert not all(same)
