"""Runs one arm on one task and writes down everything that it spent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.arms import Arm, Setup, Stepper
from benchmarks.counting import Meter, live_tensor_bytes

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
    peak_bytes: int = 0
    """CUDA: peak allocation of the run; CPU: tensors alive at its end beyond those
    before it."""
    bookkeeping_share: float = math.nan
    """hybridopt's own time over the run's wall time; nan for other arms."""
    final_loss: float = math.nan
    error: float = math.nan
    """The task's own error at the end, where it differs from the loss."""
    failure: str = ""
    """Exception that ended the run, if one did."""
    points: list[Point] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Back from plain values."""
        points = [Point(**p) for p in values["points"]]
        return cls(**{**values, "points": points})


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


def run(task: Task, arm: Arm, setup: Setup, account: Run, limits: Limits) -> Run:
    """Train with one arm and fill in its account.

    Evaluations are outside both clocks. An exception of the arm ends its run and is
    recorded; what was spent until then is kept.
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
        for point in _train(task, stepper, setup, limits, device):
            account.points.append(point)
    except Exception as failure:
        account.failure = f"{type(failure).__name__}: {failure}"
    account.forwards, account.backwards = meter.forwards, meter.backwards
    account.validations, account.cost = meter.validations, meter.cost
    account.wall_s, account.process_s = meter.wall_s, meter.process_s
    if device.type == "cuda":
        account.peak_bytes = torch.cuda.max_memory_allocated(device)
    else:
        account.peak_bytes = live_tensor_bytes() - held_before
    if account.points and not account.failure:
        account.final_loss = account.points[-1].loss
        account.error = task.evaluate() if _full_batch(task) else account.final_loss
    if stepper is not None:
        account.statistics = _plain(stepper.statistics())
        spent = account.statistics.get("bookkeeping_s")
        if isinstance(spent, float) and meter.wall_s > 0:
            account.bookkeeping_share = spent / meter.wall_s
    return account


def _train(
    task: Task, stepper: Stepper, setup: Setup, limits: Limits, device: torch.device
) -> Iterator[Point]:
    meter = stepper.meter
    begin_step = getattr(task, "begin_step", None)
    done = 0
    yield Point(0, 0.0, 0.0, 0.0, _loss(task, stepper))
    for stop in evaluation_steps(setup.steps, limits):
        with meter.timed(device):
            while done < stop and meter.cost < limits.max_cost:
                if begin_step is not None:
                    begin_step(done, setup.steps)
                stepper.step()
                done += 1
        loss = _loss(task, stepper)
        yield Point(done, meter.cost, meter.wall_s, meter.process_s, loss)
        if loss <= limits.target_loss or meter.cost >= limits.max_cost:
            return


def _full_batch(task: Task) -> bool:
    return bool(getattr(task, "full_batch", False))


def _loss(task: Task, stepper: Stepper) -> float:
    """What arms are compared by: held-out loss; on full-batch problems, which are
    optimization problems, the training loss itself.
    """
    with stepper.evaluation():
        if not _full_batch(task):
            return task.evaluate()
        with torch.no_grad():
            return float(task.closure())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what JSON can hold, one level of nesting; the rest as text."""
    simple = (bool, int, float, str, type(None))
    return {
        str(key): value if isinstance(value, simple) else _nested(value)
        for key, value in values.items()
    }


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): str(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [str(v) for v in value]
    return str(value)
