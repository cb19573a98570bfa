"""Decides what the next step does: real or predicted, how far, or out of the way.

All decisions come from observations that are equal on every rank; none from wall time,
so runs repeat and resume bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.control.context import context_of
from hybridopt.protocols import HorizonPolicy
from hybridopt.types import (
    DRIFT,
    Extent,
    Forecast,
    Level,
    Move,
    Mover,
    Observation,
    Outcome,
    Phase,
    Plan,
    Verdict,
    step_column,
)

__all__ = ["Controller"]

SLOW_WORTH_RATE = 0.07
"""Share per real step by which the consumable worth follows the forecast's bound."""

IDLE_PROGRESS = 0.03
"""A move worth fewer steps does not pay: none is made, unless drift moves with it."""
IDLE_DRIFT = 0.05
"""Mean drift gain below which drift moves do not pay either."""
IDLE_STEPS = 15
"""Real steps in a row with idle moves before the optimizer coasts or goes to sleep."""
WAKING_STEPS = 2
"""Last steps of a sleep at which weight space works again: when the sleep ends, a plan
needs the base's newest displacement and the slopes of the one before."""
PROBING_STEPS = 4
"""Whole steps between one sleep and the next."""
GLANCES = 2
"""Coasting, one real step in so many is measured along the drift."""
AVERAGED_GLANCES = 4  # where the base's own average of its gradients is measured
SETTLING_SHARE = 0.4
"""Share of a window in which that average still holds gradients that made the window's
direction; their noise is in both, and would speak for it."""
DEEP_GLANCES = 16
"""Asleep, one real step in so many is judged, so that the monitor keeps up."""
FIRST_SLEEP_STEPS = 64
LONGEST_SLEEP_STEPS = 2048
LONGEST_COASTING_STEPS = 256
TURNING_STEPS = 1
"""Coasting, real steps before a drift window is full at which plans are made."""


class Controller:
    """Holds the plan and everything that it depends on, besides the learned parts."""

    def __init__(self, config: HybridConfig, policy: HorizonPolicy) -> None:
        self.config = config
        self.policy = policy
        self.plan = Plan(Phase.WARMUP if config.warmup_steps else Phase.FULL)
        self.real_steps = 0
        self.warm = config.warmup_steps == 0
        self.move: Move | None = None
        """The move behind the last real step, until an observation carries it."""
        self.sleep_steps = 0
        """Real steps left to sleep or to coast."""
        self.coasting = False
        """Whether the sleep is a light one, in which drift windows go on."""
        self.hold = 0.0
        """Exponent of the share of a decaying rate to hold, by the newest forecast."""
        self.averaged = self.late = False
        """Whether the base averages its gradients, and whether plans may come a real
        step late; told before each real step while coasting."""
        self._turns_in = 0
        self._sleep_length = FIRST_SLEEP_STEPS
        self._idle_steps = 0
        self._since_predict = 0
        self._since_validation = 0
        self._caution = False
        self._last_rate = 0.0
        self._slow_worth = 0.0

    @property
    def asleep(self) -> bool:
        """Whether no move is planned; coasting, one is as a drift window turns."""
        return self.sleep_steps > 0 and not (self.coasting and self._turning)

    @property
    def sleeps_deeply(self) -> bool:
        """Whether nothing is learned either."""
        return self.sleep_steps > 0 and not self.coasting

    def learns_from(self, observation: Observation) -> bool:
        """Whether it tells something: awake, along a displacement; coasting, always."""
        if self.sleep_steps == 0:
            return not observation.partial
        return self.coasting

    @property
    def extent(self) -> Extent:
        """What is needed of this real step: all of it unless asleep or coasting, not
        about to wake up, and with no move to measure.
        """
        if self.sleep_steps <= WAKING_STEPS or self.move is not None:
            return Extent.WHOLE
        if not self.coasting:
            judged = self.real_steps % DEEP_GLANCES == 0
            return Extent.NORM if judged else Extent.GLANCE
        if self._turning:
            return Extent.TURN
        interval = AVERAGED_GLANCES if self.averaged else GLANCES
        measured = self.real_steps % interval == 0 and not self._settling
        return Extent.DRIFT if measured else Extent.GLANCE

    @property
    def extent_without_glances(self) -> Extent:
        """The same where the host cannot look without waiting."""
        extent = self.extent
        if extent is not Extent.GLANCE:
            return extent
        # Gradients that no average holds are all measured, since each is there.
        alone = self.coasting and not self.averaged
        return Extent.DRIFT if alone else Extent.NORM

    @property
    def _settling(self) -> bool:
        left = self._turns_in / self.config.drift.window_steps
        return self.averaged and left > 1.0 - SETTLING_SHARE

    @property
    def _turning(self) -> bool:
        return self._turns_in <= TURNING_STEPS + self.late

    def lr_ratio(self, rate: float) -> float:
        """This real step's learning rate over the previous one's; 1 at first."""
        return rate / self._last_rate if self._last_rate > 0 else 1.0

    # -- measuring a move ----------------------------------------------------------

    @np.errstate(all="ignore")
    def outcome(self, observation: Observation, rolled_back: bool) -> Outcome | None:
        """How the observed move turned out, by the trapezoid rule on two gradients.

        With delta the move, g its first and g' this gradient, its progress in step
        equivalents is w (1 + clip(r, -1, 1)) / 2 with r = <g', delta>/<g, delta> and w
        its first-order worth over the base step's. A move taken back made none.
        """
        move = observation.move
        if move is None:
            return None
        progress = 0.0
        if not rolled_back and move.worth > 0 and move.base_worth > 0:
            end = -float(step_column(move.coefficients) @ step_column(observation.dots))
            ratio = max(-1.0, min(1.0, end / move.worth))
            progress = 0.5 * (1.0 + ratio) * move.worth / move.base_worth
        cost = 1.0 + (2.0 if rolled_back else 0.0)
        return Outcome(move.arm, progress, move.horizon, cost, rolled_back)

    def learn(self, move: Move, outcome: Outcome) -> None:
        """Reward the move's arm: scheduled steps honestly covered per unit of cost.

        Steps consumed beyond the progress made count against the arm twice: once as
        not covered, once as debt to the schedule.
        """
        covered = 1.0 + min(outcome.progress, float(outcome.consumed_steps))
        debt = max(0.0, outcome.consumed_steps - outcome.progress)
        longest = 1.0 + self.policy.horizons[-1]
        reward = (covered - debt) / (outcome.cost * longest)
        self.policy.update(outcome.arm, move.context, reward)

    # -- planning -----------------------------------------------------------------

    def advance_real(self, rate: float, *, planned: bool = False) -> None:
        """Count an accepted real step and end warm-up when it is over.

        Args:
            rate: The step's largest learning rate.
            planned: Whether a Predict phase has begun behind the step already; then
                its plan stands.

        Warm-up lasts ``warmup_steps`` and as long as the scheduler has never stopped
        raising the rate: gains that grow against a tiny one would multiply a rising
        one.
        """
        # The first rate says nothing yet about where the rates are going.
        first = self._last_rate == 0.0
        rising = first or self.lr_ratio(rate) > 1.0 + 1e-9
        self._last_rate = rate
        self.real_steps += 1
        if self.sleep_steps:
            self.sleep_steps -= 1
        self._turns_in = max(self._turns_in - 1, 0)
        if not self.warm and self.real_steps >= self.config.warmup_steps and not rising:
            self.warm = True
        if not planned:
            self._since_predict += 1
            self.plan = Plan(Phase.FULL if self.warm else Phase.WARMUP)

    def expect_turn(self, forecast: Forecast) -> None:
        """Take in when the drift window turns, and how much of a rate to hold."""
        self._turns_in = forecast.turns_in
        self.hold = forecast.hold

    @np.errstate(all="ignore")
    def schedule(
        self,
        observation: Observation,
        verdict: Verdict,
        forecast: Forecast,
        rates: Tensor,
        slopes: Tensor,
        allowed: bool,
    ) -> Move | None:
        """Choose the move behind the real step just taken; None for no move.

        Args:
            rates: (L,) learning rates of that step.
            slopes: (L,) -<g, s> of a base step, what a move's worth is weighed by.
            allowed: Whether the monitor lets predictions happen at all.
        """
        if not (self.warm and allowed) or self.asleep:
            return None
        self._caution = verdict.level >= Level.CAUTION
        self.expect_turn(forecast)
        lower = forecast.progress_lower
        if math.isfinite(lower):
            self._slow_worth += SLOW_WORTH_RATE * (max(lower, 0.0) - self._slow_worth)
        drifts = forecast.turns_window and bool(forecast.coefficients[:, DRIFT].any())
        if forecast.progress < IDLE_PROGRESS and not drifts:
            self._watch_idleness(forecast)
            return None
        context = context_of(observation, forecast)
        arm = self.policy.choose(context, self._longest(forecast, verdict))
        horizon = self.policy.horizons[arm]
        steps, falls = step_column(forecast.coefficients), slopes.numpy()
        downhill = np.maximum(falls, 0.0)
        self.move = Move(
            forecast.coefficients,
            rates,
            horizon,
            arm,
            context,
            forecast.progress,
            float(steps @ downhill),
            float(downhill.sum()),
            float(steps @ falls),
            forecast.loss,
            forecast.loss_sigma,
        )
        if horizon:
            self._since_predict = 0
            self._since_validation += 1
            self.plan = Plan(Phase.PREDICT, Mover.GAIN, horizon, 0, arm)
        self._watch_idleness(forecast)
        return self.move

    def advance_predicted(self, can_validate: bool) -> None:
        """Count one predicted step; behind the last one comes Correct."""
        plan = self.plan
        position = plan.position + 1
        if position < plan.horizon:
            self.plan = Plan(
                Phase.PREDICT, plan.mover, plan.horizon, position, plan.arm
            )
            return
        interval = self.config.validation_interval
        due = bool(interval and self._since_validation >= interval) or self._caution
        validates = can_validate and due
        if validates:
            self._since_validation = 0
        self.plan = Plan(
            Phase.CORRECT, plan.mover, plan.horizon, position, plan.arm, validates
        )

    def advance_validated(self) -> None:
        """A forward-only validation is over; the real measurement comes next."""
        plan = self.plan
        self.plan = Plan(
            Phase.CORRECT, plan.mover, plan.horizon, plan.position, plan.arm
        )

    def after_rollback(self) -> None:
        """Start again with a real step."""
        self.move = None
        self.plan = Plan(Phase.FULL if self.warm else Phase.WARMUP)

    def _longest(self, forecast: Forecast, verdict: Verdict) -> int:
        """The most steps that the coming Predict phase may consume.

        At most the lower bound of the progress, so that a run of N scheduled steps
        keeps its schedule and its final loss.
        """
        if (
            verdict.level >= Level.WARNING
            or self._since_predict < self.config.full_steps
        ):
            return 0
        if forecast.confidence < self.config.confidence_threshold:
            return 0
        # Gains overshoot while they grow; steps consumed on the strength of that are
        # missing later to repair it. So the bound rises slowly, from zero.
        bound = min(forecast.progress_lower, self._slow_worth)
        if not math.isfinite(bound) or bound < 1.0:
            return 0
        longest = min(int(bound), self.config.max_predict_steps)
        return longest // 2 if verdict.level is Level.CAUTION else longest

    def _watch_idleness(self, forecast: Forecast) -> None:
        """Go to sleep, longer each time, when moves are worth nothing for long."""
        if forecast.progress >= IDLE_PROGRESS:
            self._idle_steps = 0
            self._sleep_length = FIRST_SLEEP_STEPS
            return
        if self.sleep_steps:
            return  # a plan made while coasting says nothing new
        self._idle_steps += 1
        drifts = forecast.drift_gain >= IDLE_DRIFT
        if self._idle_steps >= IDLE_STEPS:
            longest = LONGEST_COASTING_STEPS if drifts else LONGEST_SLEEP_STEPS
            self._idle_steps = IDLE_STEPS - PROBING_STEPS
            self.coasting = drifts
            self.sleep_steps = min(self._sleep_length, longest)
            self._sleep_length = min(2 * self._sleep_length, longest)

    # -- state --------------------------------------------------------------------

    _SCALARS = (
        "real_steps",
        "warm",
        "sleep_steps",
        "coasting",
        "hold",
        "_turns_in",
        "_sleep_length",
        "_idle_steps",
        "_since_predict",
        "_since_validation",
        "_caution",
        "_last_rate",
        "_slow_worth",
    )

    def state_dict(self) -> dict[str, Any]:
        """Plan, counters, the pending move and the policy."""
        plan = self.plan
        move = self.move
        return {
            "scalars": {k: getattr(self, k) for k in self._SCALARS},
            "plan": [
                plan.phase.value,
                plan.mover.value,
                plan.horizon,
                plan.position,
                plan.arm,
                plan.validates,
            ],
            "move": None if move is None else move.as_state(),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        phase, mover, horizon, position, arm, validates = state["plan"]
        plan = Plan(Phase(phase), Mover(mover), horizon, position, arm, validates)
        move = None if state["move"] is None else Move(**state["move"])
        self.policy.load_state_dict(state["policy"])
        for key in self._SCALARS:
            known = getattr(self, key)
            setattr(self, key, type(known)(state["scalars"].get(key, known)))
        # Saved where drift windows fitted; where they do not, nothing ends them.
        self.coasting = self.coasting and self.config.drift.enabled
        self.plan = plan
        self.move = move

    def scaled(self, rates: Tensor) -> Tensor:
        """(L, J) coefficients of the pending move at today's learning rates.

        delta_l = (lr_now / lr_seen) sum_j c_lj b_lj.
        """
        assert self.move is not None
        seen = self.move.rates
        if torch.equal(rates, seen):
            return self.move.coefficients
        ratio = torch.where(seen > 0, rates / seen, torch.zeros_like(seen))
        return self.move.coefficients * ratio.unsqueeze(1)
