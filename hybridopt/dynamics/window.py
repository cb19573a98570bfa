"""Gains of the drift move: once per window, by how the window behind it aligns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.dynamics.gains import Numbers
from hybridopt.dynamics.headroom import Room
from hybridopt.dynamics.level import LossLevel
from hybridopt.dynamics.persistence import Persistence
from hybridopt.dynamics.state import tensor_like
from hybridopt.types import DRIFT, Observation

__all__ = ["WindowGains"]

SHARPNESS = 5.0
"""Slope of the squashed alignment; a cosine of 0.2 already counts as strong."""
ROLLBACK_FACTOR = 0.25
FADE = 0.7
DOUBT = -0.8
RETREAT = 0.4
"""Below ``DOUBT`` standard errors of the cosines' mean over tensors, all gains shrink
by this factor per window: where there is a drift to follow the mean is positive window
by window, and where there is none a wrong direction costs more than a right one wins.
"""

FIRST_DOUBT = -2.0
"""The same for the first window, whose direction is a training's beginning: only what
it says beyond chance is heeded.
"""
HOLD_FROM = 0.1
"""Mean drift gain below which a schedule's decay is left alone: where noise dominates,
gains are below it within a few windows."""
LARGEST_HOLD = 0.75
PROVEN_HOLD = 0.25
"""Least that is held where steps have spoken for the drift, as a share of ``hold``."""
PROVEN_FROM = 0.05
"""Mean drift gain below which not: the optimizer then sleeps through windows, and
nobody sees whether the drift still pays.
"""
FULL_EVIDENCE = 2.0
"""Evidence in standard errors, over the last windows together, from which drift moves
are made in full. Gains alone rest at their first value where windows contradict each
other: with batches of two, moves by a quarter of such a drift and rates held for its
sake ended runs 1 % higher (research notes, "Evidence, not its absence").
"""
EVIDENCE_KEPT = 0.8
EVIDENCE_TAKEN = 0.6
"""Squares add up to 1: where nothing drifts, evidence has the variance of a window's.
"""
LARGEST_EVIDENCE = 3.0
"""Of one window."""
MOST_SURPLUS = 3.0
"""Evidence beyond ``FULL_EVIDENCE`` that speeds growth up, at most."""


class WindowGains:
    """One gain per tensor on d, the EMA's displacement over the last K real steps.

    Every K real steps the move a_l d_l is made. Over the next K steps, running dot
    products with the real gradients g measure whether it went far enough:

        cos = -sum <g, d> / sqrt(sum ||g||^2 ||d||^2)
        a <- clip(a exp(eta (1 + r x) tanh(5 cos)), minimum, maximum)

    with x = clip(e - 2, 0, 3) for e the evidence below, and r in [0, 1] the ``Room``:
    at a tuned rate gains that grow faster end runs higher, at one too low lower.

    Where the mean of cos over tensors is negative beyond ``DOUBT``, or the steps one by
    one speak against the drift (``Persistence``), every gain falls to at most 0.4 a;
    behind the first window, which moves nothing, only the mean beyond ``FIRST_DOUBT``.

    What is moved is a_l d_l times clip(e / 2, 0, 1), with e <- 0.8 e + 0.6 z over the
    windows and z the mean of cos over its standard error, at most 3 either way, and
    times the share that persistence leaves of it.

    A step whose gradient was not measured along d counts for both sums as the next one
    does that was.

    Running dots need no gradient buffer; the mean gradient's own norm is replaced by
    the root of the summed squares, which is what it is when noise dominates.

    The direction has to be older than the gradients that measure it: a direction that
    still takes in their steps (the lag itself) reads as misaligned, because each step
    overshoots along its own noise.
    """

    def __init__(self, config: HybridConfig, size: int) -> None:
        drift = config.drift
        self.enabled = drift.enabled and config.memory != "low"
        self._config = drift
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Initial gains, no window."""
        self.gains = torch.full(
            (self._size,), self._config.initial, dtype=torch.float64, device="cpu"
        )
        self.count = 0
        """Real steps in the current window."""
        self.turned = False
        """Whether the window was turned since the last observation."""
        self.windows = 0
        """Windows turned. Behind the first nothing moves: it holds the start of a
        training, which goes where the rest does not."""
        self.persistence = Persistence()
        """Evidence of the steps one by one, where ``_evidence`` is the tensors'."""
        self._forget_sums()
        self._made = False
        self._late = False  # an observation from before the turn came behind it
        self._measured = False
        self._evidence = 0.0
        self.room = Room()
        """Evidence of all tensors together that the base's steps do not overshoot."""
        self.level = LossLevel()
        """Whether the loss is where it was lowest."""

    def _forget_sums(self) -> None:
        self._dots: Numbers = np.zeros(self._size)
        self._gradients: Numbers = np.zeros(self._size)
        self._direction: Numbers = np.zeros(self._size)
        self._unmeasured = 0  # real steps since the last one that was measured
        self.persistence.forget()

    @property
    def gains(self) -> Tensor:
        """(L,) gains, in windows of drift; not to be written."""
        return self._gains

    @gains.setter
    def gains(self, value: Tensor) -> None:
        self._gains = value
        # Asked for at every plan, changed once per window.
        self._mean = float(value.mean()) if self._size else 0.0
        logs = value.clamp_min(1e-12).log()
        self._typical = float(logs.mean().exp()) if self._size else 0.0

    @property
    def mean_gain(self) -> float:
        """Arithmetic mean of the gains; 0 without drift."""
        return self._mean if self.enabled else 0.0

    @property
    def hold(self) -> float:
        """Exponent of the share of a decaying learning rate to hold.

        Drift that goes on paying says that the valley floor still falls, and decay
        slows that down as well as the noise: min(max(hold (b - 0.1) t, 0), 0.75) q with
        b the geometric mean of the gains, t ``trust`` and q the level's ``calm``: where
        the loss has risen, a rate at the edge of stability is not held. At least
        hold / 4 q where steps have spoken for the drift (``Persistence.proven``).
        """
        if not self.enabled:
            return 0.0
        held = self._config.hold * (self._typical - HOLD_FROM) * self.trust
        if self.persistence.proven and self._mean > PROVEN_FROM:
            held = max(held, self._config.hold * PROVEN_HOLD)
        return min(max(held, 0.0), LARGEST_HOLD) * self.level.calm

    @property
    def trust(self) -> float:
        """Share of the gains that evidence backs, in [0, 1]; 0 before any."""
        backed = min(max(self._evidence / FULL_EVIDENCE, 0.0), 1.0)
        return backed * self.persistence.share

    @property
    def full(self) -> bool:
        """Whether the window has all its steps."""
        return self.enabled and self.count >= self._config.window_steps

    @property
    def turns_in(self) -> int:
        """Real steps until the window turns; 0 without drift."""
        if not self.enabled:
            return 0
        steps = self._config.window_steps
        return steps if self.turned else max(steps - self.count, 0)

    def absorb(self, observation: Observation) -> None:
        """Take in one real step; after a turn it opens the next window."""
        if not self.enabled:
            return
        self.level.add(observation.loss)
        if not observation.partial:
            self.room.add(observation)
        if self.turned and observation.before_turn:
            self._late = True  # it belongs to the window that has ended
            return
        self._late = False
        if self.turned:
            self.turned = False
            self.count = 0
            self._forget_sums()
        self.count += 1
        if not observation.drift_measured:
            self._unmeasured += 1
            return
        steps = self._unmeasured + 1.0
        self._unmeasured = 0
        self._dots -= steps * observation.dots.numpy()[:, DRIFT]
        self._gradients += steps * observation.gradient_sq.numpy()
        self._direction = observation.basis_sq.numpy()[:, DRIFT].copy()
        self.persistence.add(observation, steps)

    def grow(self) -> None:
        """Move the gains when a window with a direction to measure along is full.

        Along the first direction nothing has moved, so all that it can say is whether
        to begin carefully.
        """
        first = self.windows > 0 and not self._measured
        if not (self.full and (self._made or first)) or self.turned:
            return
        norm = np.sqrt(self._gradients * self._direction)
        cosine = torch.from_numpy(self._dots / np.maximum(norm, 1e-300))
        cosine = cosine.nan_to_num(0.0, 0.0, 0.0)
        evidence = _significance(cosine)
        self._evidence = EVIDENCE_KEPT * self._evidence + EVIDENCE_TAKEN * max(
            -LARGEST_EVIDENCE, min(evidence, LARGEST_EVIDENCE)
        )
        self.persistence.close()
        factor, doubted = torch.ones_like(cosine), evidence < FIRST_DOUBT
        if self._made:
            surplus = min(max(self._evidence - FULL_EVIDENCE, 0.0), MOST_SURPLUS)
            rate = self._config.rate * (1.0 + self.room.value * surplus)
            factor = torch.exp(rate * torch.tanh(SHARPNESS * cosine))
            doubted = evidence < DOUBT or self.persistence.doubted
        if doubted:
            factor = factor.clamp_max(RETREAT)
        self.gains = (self.gains * factor).clamp(
            self._config.minimum, self._config.maximum
        )
        self._made = False  # one measurement per move
        self._measured = True

    def turn(self, moving: bool) -> Tensor | None:
        """(L,) coefficients of the drift move if it is due, else None.

        Before ``moving`` windows turn too, but nothing moves. Repeating the call gives
        the same answer until the next observation.
        """
        if not self.full or self._late:
            return None
        if not self.turned:
            self.turned = True
            self.windows += 1
            self._compare_level(moving)
        self._made = moving and self.windows > 1
        return self.gains * self.trust if self._made else torch.zeros_like(self.gains)

    def _compare_level(self, moving: bool) -> None:
        """Windows of a rate's warm-up are left out: a loss that falls towards the
        highest rate and rises at it is what schedules do.
        """
        if moving:
            self.level.close()
        else:
            self.level = LossLevel()

    def shrink(self) -> None:
        """After a rollback: a quarter of every gain."""
        self.gains = (self.gains * ROLLBACK_FACTOR).clamp_min(self._config.minimum)

    def fade(self) -> None:
        """While alignments are not to be trusted: gains shrink towards their floor."""
        self.gains = (self.gains * FADE).clamp_min(self._config.minimum)

    def state_dict(self) -> dict[str, Any]:
        """Gains and the window so far."""
        return {
            "gains": self.gains.clone(),
            "count": self.count,
            "windows": self.windows,
            "turned": self.turned,
            "made": self._made,
            "late": self._late,
            "measured": self._measured,
            "unmeasured": self._unmeasured,
            "evidence": self._evidence,
            "persistence": self.persistence.state_dict(),
            "room": self.room.state_dict(),
            "level": self.level.state_dict(),
            "dots": torch.from_numpy(self._dots.copy()),
            "gradients": torch.from_numpy(self._gradients.copy()),
            "direction": torch.from_numpy(self._direction.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError, possibly half-way, on a mismatch."""
        self.gains = tensor_like(state, "gains", self.gains)
        self._dots, self._gradients, self._direction = (
            tensor_like(state, key, self.gains).numpy()
            for key in ("dots", "gradients", "direction")
        )
        self.count, self.windows = int(state["count"]), int(state["windows"])
        self.turned, self._made = bool(state["turned"]), bool(state["made"])
        self._late = bool(state.get("late", False))
        self._measured = bool(state.get("measured", False))
        self._unmeasured = int(state.get("unmeasured", 0))
        self._evidence = float(state.get("evidence", 0.0))
        if "persistence" in state:
            self.persistence.load_state_dict(state["persistence"])
        if "room" in state:
            self.room.load_state_dict(state["room"])
        if "level" in state:
            self.level.load_state_dict(state["level"])


def _significance(cosine: Tensor) -> float:
    """Mean of (L,) cosines over its standard error; the mean's sign where L is 1."""
    mean = float(cosine.mean()) if cosine.numel() else 0.0
    if cosine.numel() < 2:
        return math.copysign(1.0, mean) if mean else 0.0
    error = float(cosine.std()) / math.sqrt(cosine.numel())
    return mean / (error + 1e-12)
