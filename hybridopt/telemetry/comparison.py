"""What was measured in two runs, and what may be said about it.

Cost counts a forward as 1/3 and a backward as 2/3 of a real step, validations
included. Speed is compared at equal loss only, by interpolation between measured
points; nothing is ever extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridopt.types import StepRecord

__all__ = [
    "BACKWARD_COST",
    "FORWARD_COST",
    "Arm",
    "Comparison",
    "EqualLoss",
    "Evaluation",
    "GainHistory",
    "Provenance",
    "reach",
    "settle",
]

FORWARD_COST = 1 / 3
"""Cost of a forward pass, in real steps."""
BACKWARD_COST = 2 / 3
"""Cost of a backward pass, in real steps."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss at one point of a run, and what the run had spent by then."""

    step: float
    """Calls to ``step`` so far; fractional where interpolated."""
    cost: float
    """In real steps: forwards / 3 + 2 backwards / 3."""
    wall_s: float
    """Seconds of training, evaluations excluded."""
    loss: float
    """In nats per byte for the demo."""


@dataclass(frozen=True, slots=True)
class GainHistory:
    """Per-tensor gains on the step direction, sampled during a run."""

    names: tuple[str, ...]
    """One per tensor."""
    steps: tuple[int, ...]
    """Calls to ``step`` at which the gains were read."""
    gains: tuple[tuple[float, ...], ...]
    """One row per entry of ``steps``, one column per tensor."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One finished run."""

    name: str
    """Short name, used in tables and legends."""
    description: str
    """What ran, in words."""
    scheduled_steps: int
    evaluations: tuple[Evaluation, ...]
    """Validation loss on the fixed held-out set, from step 0 to the end."""
    training: tuple[Evaluation, ...]
    """Mini-batch loss of every real step."""
    forward_calls: int
    backward_calls: int
    samples: int
    """Training sequences whose gradient was taken."""
    wall_s: float
    state_bytes: int
    """Bytes of optimizer state at the end of the run, as ``state_dict`` saves it."""
    records: tuple[StepRecord, ...] = ()
    """One per step; empty for a bare optimizer."""
    gains: GainHistory | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """What the optimizer counted itself."""

    @property
    def final(self) -> Evaluation:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def cost(self) -> float:
        """Total cost in real steps."""
        return FORWARD_COST * self.forward_calls + BACKWARD_COST * self.backward_calls

    @property
    def bookkeeping_share(self) -> float | None:
        """Share of the training time spent in hybridopt itself; None for a bare run."""
        if not self.records or self.wall_s <= 0:
            return None
        return sum(record.bookkeeping_s for record in self.records) / self.wall_s


@dataclass(frozen=True, slots=True)
class EqualLoss:
    """What each run had spent when it reached the same loss."""

    loss: float
    bare: Evaluation
    hybrid: Evaluation

    @property
    def cost_speedup(self) -> float:
        """Bare cost over hybrid cost; below 1 prediction lost."""
        return self.bare.cost / self.hybrid.cost

    @property
    def wall_speedup(self) -> float:
        """Bare wall time over hybrid wall time."""
        return self.bare.wall_s / self.hybrid.wall_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs of one seed: same initial weights, same batches."""

    seed: int
    bare: Arm
    hybrid: Arm
    shortened: Arm | None = None
    """The bare optimizer with its schedule shortened to the hybrid's cost."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The runs, in the order of tables and legends."""
        runs = (self.bare, self.hybrid)
        return runs if self.shortened is None else (*runs, self.shortened)

    def equal_loss(self) -> EqualLoss | None:
        """Compare at the lowest loss that both runs reached.

        That is the higher of the two final losses, so both costs are measured. The
        bare run counts from where it first got there, the hybrid from where it got
        there for good: a lucky dip of a noisy curve must not count as a gain. None when
        a run did not get below its starting loss: there is nothing to compare.
        """
        target = max(self.bare.final.loss, self.hybrid.final.loss)
        bare = reach(self.bare.evaluations, target)
        hybrid = settle(self.hybrid.evaluations, target)
        if bare is None or hybrid is None or bare.cost <= 0 or hybrid.cost <= 0:
            return None
        return EqualLoss(target, bare, hybrid)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the numbers come from."""

    title: str
    command: str
    """Repeats the run."""
    created: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    hardware: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Model, data, schedule, seeds."""
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the result, one sentence each."""


def reach(evaluations: Sequence[Evaluation], loss: float) -> Evaluation | None:
    """Find where a run first reached a loss, linearly between two evaluations.

    Returns:
        The interpolated point, or None when no evaluation is as low as ``loss`` (or
        ``loss`` is not finite): a run is never continued beyond its last point.
    """
    for index, point in enumerate(evaluations):
        if point.loss <= loss and math.isfinite(loss):
            return _crossing(evaluations, index, loss)
    return None


def settle(evaluations: Sequence[Evaluation], loss: float) -> Evaluation | None:
    """Find where a run reached a loss for good: from there to its end it stays below.

    Returns:
        The interpolated point, or None when the run does not end as low as ``loss``.
    """
    first = len(evaluations)
    while first > 0 and evaluations[first - 1].loss <= loss and math.isfinite(loss):
        first -= 1
    if first == len(evaluations):
        return None
    return _crossing(evaluations, first, loss)


def _crossing(evaluations: Sequence[Evaluation], index: int, loss: float) -> Evaluation:
    """The point at ``loss`` on the way to evaluation ``index``, which is as low."""
    point = evaluations[index]
    if index == 0 or not math.isfinite(evaluations[index - 1].loss):
        return point
    previous = evaluations[index - 1]
    share = (previous.loss - loss) / (previous.loss - point.loss)
    return Evaluation(
        step=previous.step + share * (point.step - previous.step),
        cost=previous.cost + share * (point.cost - previous.cost),
        wall_s=previous.wall_s + share * (point.wall_s - previous.wall_s),
        loss=loss,
    )
