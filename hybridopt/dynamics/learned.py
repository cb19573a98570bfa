"""A learned model between the prior's statistics and its gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.dynamics.calibration import Calibration
from hybridopt.dynamics.correction import (
    CHANNEL_LOSS,
    CHANNELS,
    Correction,
    Model,
)
from hybridopt.dynamics.features import FEATURES, FeatureExtractor
from hybridopt.dynamics.gains import DEVIATION_FLOOR
from hybridopt.dynamics.prior import PriorPredictor, check_kind
from hybridopt.dynamics.state import load_or_undo, tensor_like
from hybridopt.types import BASIS_SIZE, STEP, Forecast, Observation, Outcome

__all__ = ["LearnedPredictor"]

_TARGET_LIMIT = 5.0
"""Residuals are clipped here: one freak step must not teach everything."""


class LearnedPredictor:
    """The prior, refined by a model as far as the model has proved better.

    At each real step: the residuals that came score the model's last correction and
    become its newest targets; the prior absorbs the step; the model sees the features
    and corrects the mean alignment and its standard error, so that gains move by

        t = (m + delta) / (se exp(log_scale) + spread).

    All three are zero in an untrained model, and are multiplied by the trust that the
    calibration gives it, so the prior's behavior is the floor.
    """

    def __init__(
        self,
        config: HybridConfig,
        sizes: Sequence[int],
        ndims: Sequence[int],
        build_model: Callable[[], Model],
    ) -> None:
        """Args: ``build_model`` makes an untrained model, the same one each time."""
        self.prior = PriorPredictor(config, list(sizes))
        self.kind = f"learned-{type(config.predictor).__name__.lower()}"
        self._size = len(sizes)
        self._features = FeatureExtractor(sizes, ndims)
        self._build_model = build_model
        self._start()

    def _start(self) -> None:
        self.model = self._build_model()
        self.calibration = Calibration()
        self._features.reset()
        self._break_sequence()

    def _break_sequence(self) -> None:
        self._seen: Tensor | None = None
        self._said = Correction.none(self._size)
        self._applied = self._said

    @property
    def moving(self) -> bool:
        """Whether gains may change; set by the caller once warm-up is over."""
        return self.prior.moving

    @moving.setter
    def moving(self, value: bool) -> None:
        self.prior.moving = value

    # -- Predictor -----------------------------------------------------------------

    def observe(self, observation: Observation) -> None:
        """Learn from one accepted real step."""
        alignment = observation.alignment
        surprise = self.prior.surprise(alignment)
        self.prior.absorb(observation, alignment)
        if self._size == 0:
            return
        # An ambient autocast would change the model's arithmetic behind its back.
        with torch.autocast("cpu", enabled=False):
            if self._seen is not None and surprise is not None:
                targets = self._targets(surprise)
                self.calibration.add(targets, self._said)
                self.model.learn(self._seen, targets)
            self._seen = self._features.extract(observation, alignment, self.prior)
            self._said = self.model.correct(self._seen)
        self._applied = self.calibration.applied(self._said)
        self.prior.grow(observation.lr_ratio, self._significance())

    def forecast(self, slopes: Tensor) -> Forecast:
        """Propose the move behind the base step just taken, as the prior does."""
        worth = self.prior.worth(self._applied if self._size else None)
        spread = float(self._said.spread[:, STEP].mean()) if self._size else 0.0
        confidence = self.calibration.confidence(spread)
        return self.prior.forecast_with(slopes, worth, confidence, self.model.latent)

    def feedback(self, outcome: Outcome) -> None:
        """As the prior; a rollback also breaks the model's sequence."""
        self.prior.feedback(outcome)
        if outcome.rolled_back:
            self.model.restart()
            self._break_sequence()

    def reset(self) -> None:
        """Forget everything but ``moving``; the next forecast is the prior's."""
        self.prior.reset()
        self._start()

    def loss_path(self, horizon: int) -> tuple[list[float], list[float]]:
        """Expected losses of the next ``horizon`` real steps, standard deviations.

        The trend, plus the residuals that the model imagines as far as it is trusted.
        """
        means, sigmas = self.prior.loss_path(horizon)
        imagined = self.model.imagine(horizon) if self._size else None
        if imagined is None or not math.isfinite(self.prior.trend.sigma):
            return means, sigmas
        sigma, said = self.prior.trend.sigma, self.calibration.applied(imagined)
        shift = said.mean[:, CHANNEL_LOSS].tolist()
        blur = (said.log_scale.exp() + said.spread)[:, CHANNEL_LOSS].tolist()
        return (
            [m + sigma * s for m, s in zip(means, shift, strict=True)],
            [s * b for s, b in zip(sigmas, blur, strict=True)],
        )

    # -- parts -----------------------------------------------------------------------

    def _targets(self, surprise: Tensor) -> Tensor:
        """(L, CHANNELS) residuals of this step against the prior's forecast of it."""
        shared = torch.tensor(
            [self.prior.trend.surprise, self.prior.efficiency.surprise],
            dtype=torch.float64,
            device="cpu",
        ).expand(self._size, CHANNELS - BASIS_SIZE)
        targets = torch.cat((surprise, shared), 1)
        return targets.clamp_(-_TARGET_LIMIT, _TARGET_LIMIT)

    def _significance(self) -> Tensor:
        gains, said = self.prior.gains, self._applied
        unit = gains.deviation + DEVIATION_FLOOR
        shift = said.mean[:, :BASIS_SIZE] * unit
        error = gains.error * said.log_scale[:, :BASIS_SIZE].exp()
        return (gains.mean + shift) / (error + said.spread[:, :BASIS_SIZE] * unit)

    # -- state ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Prior, model, calibration, and the correction that is in force."""
        said = (self._said.mean, self._said.log_scale, self._said.spread)
        used = (self._applied.mean, self._applied.log_scale, self._applied.spread)
        return {
            "kind": self.kind,
            "prior": self.prior.state_dict(),
            "model": self.model.state_dict(),
            "calibration": self.calibration.state_dict(),
            "features": self._features.state_dict(),
            "seen": None if self._seen is None else self._seen.clone(),
            "corrections": torch.stack((*said, *used)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""
        load_or_undo(self._load, state, self.state_dict())

    def _load(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        none = Correction.none(self._size).mean
        like = torch.stack([none] * 6)
        corrections = tensor_like(state, "corrections", like)
        self.prior.load_state_dict(state["prior"])
        self.calibration.load_state_dict(state["calibration"])
        self._features.load_state_dict(state["features"])
        self.model.load_state_dict(state["model"])
        self._seen = None
        if state["seen"] is not None:
            width = len(FEATURES)
            empty = torch.zeros(self._size, width, dtype=torch.float32, device="cpu")
            self._seen = tensor_like(state, "seen", empty)
        self._said = Correction(corrections[0], corrections[1], corrections[2])
        self._applied = Correction(corrections[3], corrections[4], corrections[5])
