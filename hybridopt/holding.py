"""Keeping part of the learning rate that a schedule takes away, where going on pays.

A decaying schedule slows two things down: the noise around the valley floor, as it is
meant to, and the way along the floor. Where the drift moves show that the floor still
falls, the base step is made longer: by h = (peak / lr)^gamma, with gamma from the drift
gains (``WindowGains.hold``). That is a move (h - 1) s along the step's own displacement
s, which the base makes in its own pass, for no pass of ours: displacements are
proportional to the rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["LARGEST_FACTOR", "RateHold"]

LARGEST_FACTOR = 16.0
"""A schedule that goes to zero means to stop there."""


class RateHold:
    """The highest rate that each parameter group has had, and how much of it to hold.

    Never above the highest rate: what the user has not asked for is not held.
    """

    def __init__(self) -> None:
        self.peaks: list[float] = []
        """Per group; 0 for one that has not stepped."""
        self.factor = 1.0
        """Largest h of the last step."""

    def factors(self, groups: Sequence[dict[str, Any]], exponent: float) -> list[float]:
        """Per group, h of at least 1; takes the groups' rates in.

        Args:
            groups: The base's, before its step.
            exponent: gamma in [0, 1]; 0 leaves every rate alone.
        """
        rates = [float(group["lr"]) for group in groups]
        known = self.peaks + [0.0] * (len(rates) - len(self.peaks))
        self.peaks = [max(pair) for pair in zip(known, rates, strict=True)]
        factors = [
            min((peak / rate) ** exponent, LARGEST_FACTOR)
            if exponent > 0.0 and 0.0 < rate < peak
            else 1.0
            for peak, rate in zip(self.peaks, rates, strict=True)
        ]
        self.factor = max(factors, default=1.0)
        return factors

    def held(
        self, groups: Sequence[dict[str, Any]], exponent: float
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, the groups' rates are the held ones; behind it, the user's.

        A rate that the base itself changed inside stays as the base left it.
        """
        factors = self.factors(groups, exponent)
        return _NOTHING if self.factor == 1.0 else _longer(groups, factors)

    def state_dict(self) -> dict[str, Any]:
        """The highest rates, and the last factor."""
        return {"peaks": list(self.peaks), "factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.peaks = [float(peak) for peak in state["peaks"]]
        self.factor = float(state["factor"])


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _longer(
    groups: Sequence[dict[str, Any]], factors: Sequence[float]
) -> Iterator[None]:
    changed: list[tuple[dict[str, Any], Any, Any]] = []
    for group, factor in zip(groups, factors, strict=True):
        if factor == 1.0:
            continue
        rate = group["lr"]
        if isinstance(rate, Tensor):
            # In place: compiled and captured steps know the tensor, not its value.
            own = rate.clone()
            rate.mul_(factor)
            changed.append((group, own, rate.clone()))
        else:
            group["lr"] = rate * factor
            changed.append((group, rate, group["lr"]))
    try:
        yield
    finally:
        for group, own, longer in changed:
            if bool(group["lr"] != longer):
                continue
            if isinstance(own, Tensor):
                group["lr"].copy_(own)
            else:
                group["lr"] = own
