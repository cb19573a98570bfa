"""The analytic predictor: gains by significance, worth by slopes, loss by its trend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.dynamics.correction import CHANNEL_EFFICIENCY, CHANNEL_LOSS, Correction
from hybridopt.dynamics.gains import DEVIATION_FLOOR, AlignmentGains
from hybridopt.dynamics.state import load_or_undo
from hybridopt.dynamics.trend import Efficiency, Gate, Honesty, LossTrend
from hybridopt.dynamics.window import WindowGains
from hybridopt.types import (
    DRIFT,
    STEP,
    Forecast,
    Observation,
    Outcome,
    step_column,
)

__all__ = ["PriorPredictor", "Worth", "check_kind"]


@dataclass(frozen=True, slots=True)
class Worth:
    """What a correction makes of the efficiency and the loss; plain host numbers."""

    efficiency: float
    efficiency_lower: float
    loss: float
    loss_sigma: float


class PriorPredictor:
    """Gains from gradient alignment; nothing is learned but them (``Prior``).

    The move behind a real step is a_l s_l per tensor, s the step just made; once per
    drift window b_l d_l comes on top, d the filtered displacement of that window. The
    first-order worth of the former in step equivalents is w = sum_l a_l slope_l /
    sum_l slope_l over slopes that point downhill; what it delivers is w times the
    measured efficiency. Drift moves are worth a few per cent and consume no steps.

    ``moving`` is False until the caller sets it: statistics are gathered, but gains
    stay at their initial value, because gains that grow against the tiny rate of a
    learning-rate warm-up would multiply the rate that follows.

    Confidence is the lower bound of the efficiency over its mean, and 0 before the
    first observation: with no alignment seen there is no evidence for any gain.
    """

    KIND = "prior"

    def __init__(self, config: HybridConfig, sizes: list[int]) -> None:
        self.gains = AlignmentGains(config, len(sizes))
        self.window = WindowGains(config, len(sizes))
        self.trend = LossTrend()
        self.efficiency = Efficiency()
        self.gate = Gate()
        self.honesty = Honesty()
        self.moving = False
        """Whether gains may change; set by the caller once warm-up is over."""

    # -- Predictor -----------------------------------------------------------------

    def observe(self, observation: Observation) -> None:
        """Learn from one accepted real step; from a partial one, about drift only."""
        if observation.partial:
            self.coast(observation)
            return
        self.absorb(observation, observation.alignment)
        self.grow(observation.lr_ratio)

    def forecast(self, slopes: Tensor) -> Forecast:
        """Propose the move behind the base step just taken.

        Repeating the call gives the same answer. What it writes is only that a drift
        window has ended, if one has.
        """
        return self.forecast_with(slopes, self.worth(None), 1.0, None)

    def feedback(self, outcome: Outcome) -> None:
        """A rollback quarters the gains, restarts the alignments, and counts as an
        efficiency of zero; other outcomes were measured by ``observe`` already.
        """
        if outcome.rolled_back:
            self.gains.shrink()
            self.window.shrink()
            self.efficiency.add_sample(0.0)
            self.efficiency.skip()

    def reset(self) -> None:
        """Forget everything but ``moving``, which is the caller's."""
        self.gains.reset()
        self.window.reset()
        self.trend = LossTrend()
        self.efficiency = Efficiency()
        self.gate = Gate()
        self.honesty = Honesty()

    # -- parts that a learned predictor puts its correction between ----------------

    def surprise(self, alignment: Tensor) -> Tensor | None:
        """(L, J) residuals of new alignments against the running mean, in running
        standard deviations; None while there is no running mean. Changes nothing.
        """
        if self.gains.count == 0:
            return None
        return (alignment - self.gains.mean) / (self.gains.deviation + DEVIATION_FLOOR)

    @np.errstate(all="ignore")
    def absorb(self, observation: Observation, alignment: Tensor) -> None:
        """Take in the statistics of one real step; gains stay."""
        move = observation.move
        if move is not None and move.progress != 0.0:
            gains = step_column(move.coefficients)
            end = -float(gains @ step_column(observation.dots))
            self.efficiency.add(move.slope, end)
            length = float((gains * gains) @ step_column(observation.basis_sq))
            norm = observation.gradient_norm
            # A float to a power raises on overflow; a product becomes inf.
            self.gate.add(end, length, norm * norm)
        else:
            self.efficiency.skip()
        self.honesty.add(observation.loss, _promised(observation))
        self.gains.absorb(alignment)
        self.window.absorb(observation)
        self.trend.add(observation.loss)

    @np.errstate(all="ignore")
    def coast(self, observation: Observation) -> None:
        """Take in a real step of which only the drift was measured."""
        self.efficiency.skip()
        self.honesty.skip()
        self.window.absorb(observation)
        self.trend.add(observation.loss)
        if self.moving:
            self.window.grow()

    @np.errstate(all="ignore")
    def grow(self, lr_ratio: float, significance: Tensor | None = None) -> None:
        """Move the gains, by the prior's own t-values unless others are given.

        Two observations are needed: one has no spread to be significant against.
        """
        if not self.moving:
            return
        self.gains.hold_rate(lr_ratio)
        if not self.honesty.trusted:
            self.gains.fade()
            self.window.fade()
            return
        if self.gains.count > 1:
            if significance is None:
                significance = self.gains.significance()
            self.gains.grow(significance)
        self.window.grow()

    def worth(self, correction: Correction | None) -> Worth:
        """Expected efficiency and loss, corrected where a correction is given.

        The per-tensor statements about these two global numbers are averaged.
        """
        mean, error = self.efficiency.mean, self.efficiency.error
        loss, sigma = self.trend.expected, self.trend.sigma
        if correction is not None:
            said = torch.stack(
                (correction.mean, correction.log_scale, correction.spread)
            ).mean(1)
            means, scales, spreads = said.tolist()
            unit = self.efficiency.spread
            mean = min(max(mean + unit * means[CHANNEL_EFFICIENCY], 0.0), 1.0)
            error += unit * spreads[CHANNEL_EFFICIENCY]
            if math.isfinite(sigma):
                loss += sigma * means[CHANNEL_LOSS]
                sigma *= math.exp(scales[CHANNEL_LOSS]) + spreads[CHANNEL_LOSS]
        return Worth(mean, max(0.0, mean - error), loss, sigma)

    def forecast_with(
        self, slopes: Tensor, worth: Worth, confidence: float, latent: Tensor | None
    ) -> Forecast:
        """Assemble the forecast from its parts."""
        coefficients = self.gains.coefficients()
        drift = self.window.turn(self.moving)
        if drift is not None:
            coefficients[:, DRIFT] = drift
        first_order = _first_order(coefficients, slopes)
        known = self.gains.count > 0 and worth.efficiency > 0.0
        bound = worth.efficiency_lower / worth.efficiency if known else 0.0
        return Forecast(
            coefficients=coefficients,
            confidence=confidence * bound,
            progress=first_order * worth.efficiency,
            progress_lower=first_order * worth.efficiency_lower * self._open(),
            loss=worth.loss,
            loss_sigma=worth.loss_sigma,
            turns_window=drift is not None,
            turns_in=self.window.turns_in,
            drift_gain=self.window.mean_gain,
            hold=self.window.hold,
            latent=latent,
        )

    def _open(self) -> float:
        return self.gate.open if self.honesty.trusted else 0.0

    def loss_path(self, horizon: int) -> tuple[list[float], list[float]]:
        """Expected losses of the next ``horizon`` real steps, standard deviations."""
        return self.trend.path(horizon)

    # -- state ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Gains and statistics."""
        return {
            "kind": self.KIND,
            "moving": self.moving,
            "gains": self.gains.state_dict(),
            "trend": self.trend.state_dict(),
            "efficiency": self.efficiency.state_dict(),
            "gate": self.gate.state_dict(),
            "honesty": self.honesty.state_dict(),
            "window": self.window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""
        load_or_undo(self._load, state, self.state_dict())

    def _load(self, state: dict[str, Any]) -> None:
        check_kind(state, self.KIND)
        self.gains.load_state_dict(state["gains"])
        self.trend.load_state_dict(state["trend"])
        self.efficiency.load_state_dict(state["efficiency"])
        self.gate.load_state_dict(state["gate"])
        self.honesty.load_state_dict(state["honesty"])
        self.window.load_state_dict(state["window"])
        self.moving = bool(state["moving"])


def _promised(observation: Observation) -> float:
    """-<g', delta> of the base step and the move behind it."""
    dots = observation.dots.numpy()
    taken = float(dots[:, STEP].sum())
    if observation.move is not None:
        taken += float(np.vdot(observation.move.coefficients.numpy(), dots))
    return -taken


def _first_order(coefficients: Tensor, slopes: Tensor) -> float:
    """First-order worth of the step move in base steps.

    A loop over host numbers: sums over a few tensors cost less here than there.
    """
    steps = slopes.tolist()
    gained = coefficients[:, STEP].tolist()
    worth = sum(
        [a * step for a, step in zip(gained, steps, strict=True) if a * step > 0.0]
    )
    total = sum([step for step in steps if step > 0.0])
    return worth / total if total > 0.0 and math.isfinite(worth / total) else 0.0


def check_kind(state: dict[str, Any], kind: str) -> None:
    """Raises CheckpointError (through its callers) unless ``state`` is of ``kind``."""
    if state["kind"] != kind:
        raise ValueError(f"kind={state['kind']!r}: must be {kind!r}")
