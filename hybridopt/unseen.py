"""Real steps that the host never sees: asleep or coasting on a GPU.

Even one look at a GPU's numbers is a wait. So there the base gets the flag that says
whether a step's loss and gradients are finite on the device, skips the step by itself
if they are not, and nobody else asks. How many were skipped comes along with the next
numbers that are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

from torch import Tensor

from hybridopt.errors import RecoveryAction
from hybridopt.types import Level, StepRecord

__all__ = ["Look", "Unseen"]


@dataclass(frozen=True, slots=True)
class Look:
    """What was asked of one such step."""

    flag: Tensor
    """0-dim float32 on the device: 1.0 where something is not finite."""
    loss: Tensor | float
    """Its loss, a copy on the device; nan without one."""
    rate: float
    """Its largest learning rate."""


class Unseen:
    """What has to be known from one such step to the next."""

    def __init__(self) -> None:
        self.known: list[Tensor] = []
        """Parameters that had gradients at the last step that was measured; each has
        its hybrid tensors and its state in the base."""
        self._skips: Tensor | None = None
        self._look: Look | None = None
        self._record: StepRecord | None = None

    def expects(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that are known."""
        known = self.known
        return len(parameters) == len(known) and all(map(is_, parameters, known))

    def note(self, look: Look) -> None:
        """Count a step; the base may have skipped it."""
        self._skips = look.flag if self._skips is None else self._skips + look.flag

    def take_skips(self) -> Tensor | None:
        """How many were skipped since this was asked last, on the device."""
        skips, self._skips = self._skips, None
        return skips

    def remember(self, record: StepRecord, look: Look | None) -> None:
        """Keep the newest record, and the look that it lacks the numbers of."""
        self._record, self._look = (None, None) if look is None else (record, look)

    def completed(self, record: StepRecord | None) -> StepRecord | None:
        """The record with its loss, if it lacks it; waits for that."""
        look = self._look
        if look is None or record is not self._record or record is None:
            return record
        record = replace(record, loss=float(look.loss))
        if float(look.flag) != 0.0:
            record = replace(
                record,
                verdict=Level.CRITICAL,
                action=RecoveryAction.SKIP_STEP,
                reason="non_finite",
            )
        self._look = self._record = None
        return record

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Which parameters are known, by their place among all of them."""
        known = set(map(id, self.known))
        return {"rows": [row for row, p in enumerate(parameters) if id(p) in known]}

    def load_state_dict(
        self, state: dict[str, Any], parameters: Sequence[Tensor]
    ) -> None:
        """Restore what ``state_dict`` returned."""
        self.known = [parameters[int(row)] for row in state["rows"]]
        self._skips = self._look = self._record = None
