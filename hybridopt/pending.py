"""A real step whose numbers are on their way to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridopt.types import Extent, Move, Observation, StepRecord, Verdict
from hybridopt.weights.reading import PendingReading, Reading

__all__ = ["Pending"]


@dataclass(slots=True)
class Pending:
    """What was known when a real step's measurement was launched.

    Where the base skips bad steps on the device, a real step does not wait for its own
    numbers: they are taken in one real step later, or at the end of a Predict phase.
    """

    step: int
    """Index of the call to ``step``."""
    reading: PendingReading | Reading
    has_loss: bool
    rates: Tensor
    """(L,) learning rates of the step."""
    anchored: bool
    """Whether there was a displacement to measure the gradient against."""
    extent: Extent = Extent.WHOLE
    """How much of it was measured."""
    move: Move | None = None
    """The move behind the real step before, which this one measures."""
    before_turn: bool = False
    """Whether the drift window turned since the measurement was launched."""
    view: tuple[Observation, Verdict] | None = None
    """What the host made of the numbers, once it has looked."""
    record: StepRecord | None = None
    """The step's record, as long as it lacks the numbers."""

    def read(self) -> Reading:
        """The numbers; waits for them where they have not arrived."""
        if isinstance(self.reading, PendingReading):
            self.reading = self.reading.wait()
        return self.reading

    def state_dict(self) -> dict[str, Any]:
        """Everything that taking the step in depends on; waits for its numbers."""
        reading = self.read()
        return {
            "step": self.step,
            "statistics": reading.statistics,
            "loss": reading.loss,
            "slopes": reading.slopes,
            "skips": reading.skips,
            "has_loss": self.has_loss,
            "rates": self.rates,
            "anchored": self.anchored,
            "extent": self.extent.value,
            "move": None if self.move is None else self.move.as_state(),
            "before_turn": self.before_turn,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Pending:
        """Build what ``state_dict`` described; its numbers have arrived."""
        reading = Reading(
            state["statistics"].to(torch.float64),
            float(state["loss"]),
            state["slopes"].to(torch.float64),
            int(state.get("skips", 0)),
        )
        return cls(
            step=int(state["step"]),
            reading=reading,
            has_loss=bool(state["has_loss"]),
            rates=state["rates"],
            anchored=bool(state["anchored"]),
            extent=Extent(state["extent"]),
            move=None if state["move"] is None else Move(**state["move"]),
            before_turn=bool(state["before_turn"]),
        )
