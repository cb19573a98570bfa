"""Runs one arm on one task and writes down everything that it spent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.arms import Arm, Setup, Stepper
from benchmarks.batchnorm import recalibrated
from benchmarks.counting import Meter, live_tensor_bytes
from benchmarks.estimates import Outcome, first_reach
from benchmarks.pacing import Pacer

__all__ = ["Limits", "Point", "Run", "Task", "evaluation_steps", "run"]


class Task(Protocol):
    """What the runner needs of a task; ``advance`` and ``begin_step`` are optional."""

    model: nn.Module

    def closure(self) -> Tensor: ...

    def evaluate(self) -> float: ...


@dataclass(frozen=True)
class Point:
    """The state of a run at one evaluation."""

    step: int
    """Scheduled steps done."""
    cost: float
    """Work in real steps: forward 1/3, backward 2/3."""
    wall_s: float
    process_s: float
    loss: float


@dataclass(frozen=True)
class Limits:
    """When a run is evaluated and when it may end early."""

    evaluations: int = 8
    """Evaluations over the scheduled steps, evenly spaced, outside the clock."""
    growth: float = 0.0
    """If positive: evaluate at steps that grow by this share instead, so that the cost
    of reaching a loss is known to about this precision at any scale."""
    max_cost: float = math.inf
    """End once this much has been spent."""
    target_loss: float = -math.inf
    """End once an evaluation is at or below this."""


@dataclass
class Run:
    """One run's account; plain values, ready for JSON."""

    case: str
    arm: str
    seed: int
    fraction: float
    """Scheduled steps over the case's own."""
    steps: int
    lr: float
    forwards: int = 0
    backwards: int = 0
    validations: int = 0
    cost: float = 0.0
    wall_s: float = 0.0
    process_s: float = 0.0
    pace_wall_s: float = math.nan
    """Wall seconds of a step of the bare base meanwhile; nan where none was made."""
    pace_process_s: float = math.nan
    """The same in process seconds."""
    peak_bytes: int = 0
    """CUDA: peak allocation of the run; CPU: tensors alive at its end beyond those
    before it."""
    bookkeeping_share: float = math.nan
    """hybridopt's own time over the run's wall time; nan for other arms."""
    final_loss: float = math.nan
    error: float = math.nan
    """The task's own error at the end, where it differs from the loss."""
    objective: float = math.nan
    """Training objective at the end, on a fixed large part of the training data: tells
    a slower optimizer from a faster one that overfits. nan where the loss is it."""
    done: int = 0
    """Scheduled steps made."""
    reached: list[float] | None = None
    """Target mode: cost, wall and process time, as in ``amounts``, at which the loss
    first was as low as the base's best; None if it never was."""
    failure: str = ""
    """Exception that ended the run, if one did."""
    points: list[Point] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    """How the forecasts of a hybrid arm came out, see ``benchmarks.calibration``."""

    @property
    def paced(self) -> bool:
        """Whether its time is counted in steps that the bare base made meanwhile."""
        return self.pace_process_s > 0.0

    def amounts(self, point: Point | Run) -> tuple[float, float, float]:
        """Cost, wall time and process time of a point, or of the whole run.

        Times are in bare steps where the run was paced, else in seconds.
        """
        wall, process = point.wall_s, point.process_s
        if self.paced:
            wall, process = wall / self.pace_wall_s, process / self.pace_process_s
        return point.cost, wall, process

    def note_target(self, loss: float) -> None:
        """Set ``reached`` from the points: each amount log-linear between two."""
        spent = [self.amounts(p) for p in self.points]
        found = [
            first_reach(
                [
                    Outcome(p.loss, s[i])
                    for p, s in zip(self.points, spent, strict=True)
                ],
                loss,
            )
            for i in range(3)
        ]
        known = [amount for amount in found if amount is not None]
        self.reached = known if len(known) == len(found) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def evaluation_steps(steps: int, limits: Limits) -> list[int]:
    """The steps after which a run is evaluated, the last included."""
    if limits.growth > 0.0:
        chosen, step = [], 1
        while step < steps:
            chosen.append(step)
            step = max(step + 1, round(step * (1.0 + limits.growth)))
        return [*chosen, steps]
    count = max(1, min(limits.evaluations, steps))
    return sorted({round(steps * (i + 1) / count) for i in range(count)})


def run(
    task: Task,
    arm: Arm,
    setup: Setup,
    account: Run,
    limits: Limits,
    pacer: Pacer | None = None,
) -> Run:
    """Train with one arm and fill in its account.

    Evaluations and the pacer's steps are outside both clocks. An exception of the arm
    ends its run and is recorded; what was spent until then is kept.
    """
    device = next(task.model.parameters()).device
    held_before = live_tensor_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held_before = 0
    torch.manual_seed(account.seed)
    meter = Meter(task.closure, getattr(task, "advance", None))
    stepper: Stepper | None = None
    try:
        stepper = arm.build(task.model, meter, setup)
        for point in _train(task, stepper, setup, limits, device, pacer):
            account.points.append(point)
    except Exception as failure:
        account.failure = f"{type(failure).__name__}: {failure}"
    account.forwards, account.backwards = meter.forwards, meter.backwards
    account.validations, account.cost = meter.validations, meter.cost
    if pacer is not None and not account.failure:
        account.pace_wall_s = pacer.step_wall_s
        account.pace_process_s = pacer.step_process_s
    account.wall_s, account.process_s = meter.wall_s, meter.process_s
    if device.type == "cuda":
        account.peak_bytes = torch.cuda.max_memory_allocated(device)
        account.peak_bytes -= 0 if pacer is None else pacer.held_bytes
    else:
        account.peak_bytes = live_tensor_bytes() - held_before
    if account.points and not account.failure:
        account.final_loss = account.points[-1].loss
        account.error = task.evaluate() if _full_batch(task) else math.nan
        account.objective = _objective(task, stepper)
    if account.points:
        account.done = account.points[-1].step
    if stepper is not None:
        account.statistics = _chosen(stepper.statistics())
        account.calibration = stepper.calibration()
        spent = account.statistics.get("bookkeeping_s")
        if isinstance(spent, float) and meter.wall_s > 0:
            account.bookkeeping_share = spent / meter.wall_s
    return account


def _train(
    task: Task,
    stepper: Stepper,
    setup: Setup,
    limits: Limits,
    device: torch.device,
    pacer: Pacer | None,
) -> Iterator[Point]:
    meter = stepper.meter
    begin_step = getattr(task, "begin_step", None)
    done = 0
    yield Point(0, 0.0, 0.0, 0.0, _loss(task, stepper))
    if pacer is not None:
        pacer.begin()
    for stop in evaluation_steps(setup.steps, limits):
        while done < stop and meter.cost < limits.max_cost:
            with meter.timed(device):
                while done < stop and meter.cost < limits.max_cost:
                    if begin_step is not None:
                        begin_step(done, setup.steps)
                    stepper.step()
                    done += 1
                    if pacer is not None and pacer.due:
                        break
            if pacer is not None and pacer.due:
                pacer.block()
        loss = _loss(task, stepper)
        over = loss <= limits.target_loss or meter.cost >= limits.max_cost
        if pacer is not None and (over or done == setup.steps):
            pacer.block()
        yield Point(done, meter.cost, meter.wall_s, meter.process_s, loss)
        if over:
            return


def _full_batch(task: Task) -> bool:
    return bool(getattr(task, "full_batch", False))


def _loss(task: Task, stepper: Stepper) -> float:
    """What arms are compared by: held-out loss; on full-batch problems, which are
    optimization problems, the training loss itself.
    """
    with stepper.evaluation():
        if _full_batch(task):
            with torch.no_grad():
                return float(task.closure())
        if not stepper.judged_elsewhere:
            return task.evaluate()
        with recalibrated(task):
            return task.evaluate()


def _objective(task: Task, stepper: Stepper | None) -> float:
    """The training objective, where a task tells it apart from its held-out loss."""
    measure = getattr(task, "objective", None)
    if measure is None or stepper is None:
        return math.nan
    with stepper.evaluation():
        return float(measure())


_STATISTICS = (
    "steps", "real_steps", "predicted_steps", "validated_steps", "folded_moves",
    "secant_moves", "rolled_back_steps", "skipped_steps", "bookkeeping_s",
    "predictor_error", "extra_bytes", "kernels",
)  # fmt: skip


def _chosen(values: dict[str, Any]) -> dict[str, Any]:
    """Of the optimizer's own figures those that tables or readers use."""
    return {key: values[key] for key in _STATISTICS if key in values}
