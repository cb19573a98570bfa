"""Gradients taken ahead of the weights: each base step made along its newest part.

A base with memory (momentum) goes on along old gradients. With s its last displacement
and p the one before, the weights are put kappa s ahead of its trajectory:

    theta <- theta + s + kappa s - kappa p,

so that gradients are taken where the base is about to be, as in Nesterov's method. Only
the newest lead is in the weights: kappa does not add up. How long it should be is
learned (``dynamics/lead.py``); the arithmetic is in ``weights/ahead.py``.

Source: Nesterov 1983, in the form of Sutskever et al. 2013 (gradients at the
looked-ahead weights) and Ma and Yarats 2019, arXiv 1810.06801 (equation 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import LeadConfig
from hybridopt.dynamics.lead import LeadLength
from hybridopt.protocols import Ops
from hybridopt.weights.ahead import (
    Part,
    leads,
    measure,
    measure_on_host,
    put_ahead,
    remember,
    sample,
)
from hybridopt.weights.buckets import Bucket
from hybridopt.weights.reading import PendingReading

__all__ = ["Lead"]

INTERVAL_STEPS = 4
"""Steps from one measurement to the next. While there is no lead only the two steps
before each are kept."""
IDLE_INTERVAL_STEPS = 16
"""The same where there has been no lead for ``IDLE_STEPS``."""
ASLEEP_INTERVAL_STEPS = 32
"""The same without a lead while the optimizer is asleep."""
IDLE_STEPS = 128
RARER_ON_DEVICE = 2
"""Factor on all of them without a lead on a GPU, where looking takes the host longer
than the card."""
SHORTEST = 0.25
"""Base steps: a shorter lead is not worth its passes over the weights."""


class Lead:
    """How far ahead the weights are, and what was last measured of it.

    Args:
        config: ``rate`` 0 keeps the lead at 0, and nothing is kept or measured.
    """

    def __init__(self, config: LeadConfig) -> None:
        self.length = LeadLength(config)
        self._enabled = config.enabled and config.rate > 0.0
        self.steps = 0
        """Base steps since there may be a lead."""
        self.idle_steps = 0
        """Base steps since there was a lead."""
        self.made = 0.0
        """kappa of the lead that is in the weights."""
        self._known = 0
        """How many of the last two displacements are kept."""
        self._side = 0
        self._sampled = False
        """Whether they are those of a sample of the weights only."""
        self._turn = 0
        """Of the sample; the next one with each measurement."""
        self._reading: PendingReading | Tensor | None = None
        """Numbers on their way to the host; on the CPU none ever are."""
        self.unshared: Tensor | None = None
        """(4,), this rank's part of what was measured last, until ranks add it up."""
        self._before: list[list[Tensor]] = []
        self._buckets: Sequence[Bucket | Part] = ()

    def begin(
        self,
        ops: Ops,
        buckets: Callable[[], Sequence[Bucket]],
        *,
        asleep: bool,
        on_host: bool = True,
        shares: Tensor | None = None,
    ) -> bool:
        """Before the base's step, gradients being there: measure, keep the weights.

        Args:
            ops: Measure.
            buckets: Looks the tracked ones up, if they are needed.
            asleep: Whether nothing else moves weights, so that little is measured.
            on_host: Whether the first parameter is on the CPU.
            shares: (L, 1) weights of this rank's sums in those of all; None if alone.

        Returns:
            Whether ``end`` has something to do behind the step.
        """
        if not self._enabled:
            return False
        self.steps += 1
        self.idle_steps = 0 if self.made > 0.0 else self.idle_steps + 1
        interval = self._interval(asleep, on_host)
        measures = self._known == 2 and self._due(0, interval)
        if not (measures or self._keeps(interval)):
            self._known = 0
            return False
        found = buckets()
        if not leads(found):
            self.drop()
            return False
        # Ranks look at all rows: sums per tensor are what they have weights for.
        pools = shares is None and all([b.on_host for b in found])
        # A sample kept on the CPU says nothing where its checkpoint went on elsewhere.
        if measures and (pools or not self._sampled):
            self._measure(ops, found, pools, shares)
            if not self._keeps(interval):
                self._known = 0
                self._turn += 1
                return False
        sampled = pools and self._lead() <= 0.0 and self.made <= 0.0
        if self._sampled and not sampled:
            self._known = 0  # of the other weights nothing is kept
        self._sampled = sampled
        self._buckets = sample(found, self._turn) if sampled else found
        with torch.no_grad():
            self._before = remember(self._buckets, self._side)
        # Should the base fail now, the older displacement is lost.
        self._known = min(self._known, 1)
        return True

    def end(self, ops: Ops, skip: Tensor | None = None) -> None:
        """Behind the base's step: take the old lead back and make the new one.

        Args:
            ops: Move the weights.
            skip: 0-dim, 1.0 where the base skipped its step on the device.
        """
        lead = self._lead()
        with torch.no_grad():
            put_ahead(
                ops, self._buckets, self._before, self._side, lead, self.made, skip
            )
        self._side = 1 - self._side
        self._known += 1
        self.made = lead
        self._before, self._buckets = [], ()

    def drop(self) -> None:
        """Let the weights be where they are: what they were ahead by is forgotten."""
        self.made, self._known = 0.0, 0

    def _lead(self) -> float:
        """Kappa from this step on."""
        return self.length.value if self.length.value >= SHORTEST else 0.0

    def _interval(self, asleep: bool, on_host: bool) -> int:
        if self._lead() > 0.0 or self.made > 0.0:
            return INTERVAL_STEPS
        apart = 1 if on_host else RARER_ON_DEVICE
        if asleep:
            return ASLEEP_INTERVAL_STEPS * apart
        idle = self.idle_steps > IDLE_STEPS
        return (IDLE_INTERVAL_STEPS if idle else INTERVAL_STEPS) * apart

    def _keeps(self, interval: int) -> bool:
        """Whether this step's displacement is needed: for a lead, or as one of the two
        that the next measurement takes.
        """
        if self._lead() > 0.0 or self.made > 0.0:
            return True
        return self._due(1, interval) or self._due(2, interval)

    def _due(self, ahead: int, interval: int) -> bool:
        return (self.steps + ahead) % interval == 0

    def share(self, total: Tensor) -> None:
        """Learn from ``unshared`` of all ranks together."""
        self.unshared = None
        self.length.learn(total.unsqueeze(0))

    def _measure(
        self,
        ops: Ops,
        buckets: Sequence[Bucket],
        pools: bool,
        shares: Tensor | None,
    ) -> None:
        self._settle()
        if shares is None and self.unshared is not None:
            self.share(self.unshared)  # from a checkpoint that several ranks saved
        if shares is not None:
            # The host waits at every step there; the sum goes with the next one's.
            found = measure(ops, buckets, self._side).wait().statistics[:, :4]
            self.unshared = (found * shares[: len(found)]).sum(0)
        elif pools:
            parts = sample(buckets, self._turn) if self._sampled else buckets
            self.length.learn(measure_on_host(parts, self._side))
        else:
            self._reading = measure(ops, buckets, self._side)

    def _settle(self) -> None:
        """Learn from what was measured last: on a GPU those numbers have arrived."""
        if self._reading is not None:
            self.length.learn(self._numbers())
            self._reading = None

    def _numbers(self) -> Tensor:
        if isinstance(self._reading, PendingReading):
            statistics = self._reading.wait().statistics
            self._reading = statistics[:, :4]
        assert self._reading is not None
        return self._reading

    def state_dict(self) -> dict[str, Any]:
        """Everything but the displacements; waits for numbers on their way."""
        return {
            "length": self.length.state_dict(),
            "steps": self.steps,
            "idle_steps": self.idle_steps,
            "made": self.made,
            "known": self._known,
            "side": self._side,
            "sampled": self._sampled,
            "turn": self._turn,
            "reading": None if self._reading is None else self._numbers(),
            "unshared": self.unshared,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.length.load_state_dict(state["length"])
        self.steps, self.made = int(state["steps"]), float(state["made"])
        self.idle_steps = int(state["idle_steps"])
        self._known, self._side = int(state["known"]), int(state["side"])
        self._sampled = bool(state.get("sampled", False))
        self._turn = int(state.get("turn", 0))
        self._reading = state["reading"]
        self.unshared = state.get("unshared")
