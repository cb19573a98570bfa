"""A learned model between the prior's statistics and its gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import HybridConfig
from hybridopt.dynamics.calibration import Calibration
from hybridopt.dynamics.correction import CHANNEL_LOSS, CHANNELS, Correction, Model
from hybridopt.dynamics.features import FEATURES, FeatureExtractor
from hybridopt.dynamics.gains import DEVIATION_FLOOR
from hybridopt.dynamics.prior import PriorPredictor, check_kind
from hybridopt.dynamics.state import load_or_undo, tensor_like
from hybridopt.types import BASIS_SIZE, STEP, Forecast, Observation, Outcome

__all__ = ["LearnedPredictor"]

_TARGET_LIMIT = 5.0
"""Residuals are clipped here: one freak step must not teach everything."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One real step and what came after it."""

    features: Tensor
    """(L, F) float32."""
    code: Tensor
    """(L, W) float32: what the model made of them."""
    surprise: Tensor
    """(L, J) residuals of the next alignments against the prior's forecast."""
    shared: tuple[float, float]
    """Residuals of the next loss and the next efficiency; nan where not observed."""


class LearnedPredictor:
    """The prior, refined by a model as far as the model has proved better.

    At each real step the residuals against the prior's forecast become targets of what
    the model saw one step earlier; the prior absorbs the step; the model takes in the
    features. As far as the model is trusted, gains then move by

        t = (m + delta) / (se exp(log_scale) + spread).

    Every ``block_steps`` real steps the model's forecasts of those steps are scored,
    which renews the trust, and only then the model learns from them: the scores are
    out of sample. An untrained or untrusted model costs its features and its state;
    what the prior would do is done, bit for bit.
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
        self._seen: Tensor | None = None
        self._code: Tensor | None = None
        self._block: list[Sample] = []
        self._applied: Correction | None = None

    @property
    def moving(self) -> bool:
        """Whether gains may change; set by the caller once warm-up is over."""
        return self.prior.moving

    @moving.setter
    def moving(self, value: bool) -> None:
        self.prior.moving = value

    # -- Predictor -----------------------------------------------------------------

    def observe(self, observation: Observation) -> None:
        """Learn from one accepted real step; a partial one breaks the sequence."""
        if observation.partial:
            self.prior.coast(observation)
            if self._seen is not None:
                self.model.restart()
            self._seen = self._code = self._applied = None
            return
        alignment = observation.alignment
        surprise = self.prior.surprise(alignment)
        self.prior.absorb(observation, alignment)
        if self._size == 0:
            return
        # An ambient autocast would change the model's arithmetic behind its back.
        with torch.autocast("cpu", enabled=False):
            if not (self._seen is None or self._code is None or surprise is None):
                shared = (self.prior.trend.surprise, self.prior.efficiency.surprise)
                self._block.append(Sample(self._seen, self._code, surprise, shared))
                if len(self._block) >= self.model.block_steps:
                    self._learn_block()
            self._seen = self._features.extract(observation, alignment, self.prior)
            self._code = self.model.encode(self._seen)
            self._applied = None
            if self.calibration.trusted:
                said = self.model.decode(self._code)
                self._applied = self.calibration.applied(said)
        self.prior.grow(observation.lr_ratio, self._significance())

    def forecast(self, slopes: Tensor) -> Forecast:
        """Propose the move behind the base step just taken, as the prior does."""
        confidence = 1.0
        if self._applied is not None:
            spread = float(self._applied.spread[:, STEP].mean())
            confidence = self.calibration.confidence(spread)
        worth = self.prior.worth(self._applied)
        return self.prior.forecast_with(slopes, worth, confidence, self.model.latent)

    def feedback(self, outcome: Outcome) -> None:
        """As the prior; a rollback also breaks the model's sequence."""
        self.prior.feedback(outcome)
        if outcome.rolled_back:
            if self._block:
                with torch.autocast("cpu", enabled=False):
                    self._learn_block()
            self.model.restart()
            self._seen = self._code = self._applied = None

    def reset(self) -> None:
        """Forget everything but ``moving``; the next forecast is the prior's."""
        self.prior.reset()
        self._start()

    def loss_path(self, horizon: int) -> tuple[list[float], list[float]]:
        """Expected losses of the next ``horizon`` real steps, standard deviations.

        The trend, plus the residuals that the model imagines as far as it is trusted.
        """
        means, sigmas = self.prior.loss_path(horizon)
        sigma = self.prior.trend.sigma
        imagined = self.model.imagine(horizon) if self.calibration.trusted else None
        if imagined is None or not math.isfinite(sigma):
            return means, sigmas
        said = self.calibration.applied(imagined)
        shift = said.mean[:, CHANNEL_LOSS].tolist()
        blur = (said.log_scale.exp() + said.spread)[:, CHANNEL_LOSS].tolist()
        return (
            [m + sigma * s for m, s in zip(means, shift, strict=True)],
            [s * b for s, b in zip(sigmas, blur, strict=True)],
        )

    # -- parts -----------------------------------------------------------------------

    def _learn_block(self) -> None:
        """Score what was said about the steps that wait, then learn from them."""
        block, self._block = self._block, []
        features = torch.stack([sample.features for sample in block])
        codes = torch.stack([sample.code for sample in block])
        surprise = torch.stack([sample.surprise for sample in block])
        shared = [[sample.shared] for sample in block]
        rows = torch.tensor(shared, dtype=torch.float64, device="cpu")
        targets = torch.cat((surprise, rows.expand(-1, self._size, -1)), -1)
        targets.clamp_(-_TARGET_LIMIT, _TARGET_LIMIT)
        # The weights are those of the time: they change in ``learn`` only.
        self.calibration.add(targets, self.model.decode(codes))
        self.model.learn(features, targets)

    def _significance(self) -> Tensor | None:
        """(L, J) corrected t-values; None while the prior's own are in force."""
        gains, said = self.prior.gains, self._applied
        if said is None:
            return None
        unit = gains.deviation + DEVIATION_FLOOR
        shift = said.mean[:, :BASIS_SIZE] * unit
        error = gains.error * said.log_scale[:, :BASIS_SIZE].exp()
        return (gains.mean + shift) / (error + said.spread[:, :BASIS_SIZE] * unit)

    # -- state ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Prior, model, calibration, waiting samples, the correction in force."""
        applied = self._applied
        return {
            "kind": self.kind,
            "prior": self.prior.state_dict(),
            "model": self.model.state_dict(),
            "calibration": self.calibration.state_dict(),
            "features": self._features.state_dict(),
            "seen": None if self._seen is None else self._seen.clone(),
            "code": None if self._code is None else self._code.clone(),
            "block": [
                {
                    "features": sample.features.clone(),
                    "code": sample.code.clone(),
                    "surprise": sample.surprise.clone(),
                    "shared": list(sample.shared),
                }
                for sample in self._block
            ],
            "applied": None
            if applied is None
            else torch.stack((applied.mean, applied.log_scale, applied.spread)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch."""
        load_or_undo(self._load, state, self.state_dict())

    def _load(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        self.prior.load_state_dict(state["prior"])
        self.model.load_state_dict(state["model"])
        self.calibration.load_state_dict(state["calibration"])
        self._features.load_state_dict(state["features"])
        seen = torch.zeros(self._size, len(FEATURES), dtype=torch.float32, device="cpu")
        code = seen.new_zeros(self._size, self.model.code_size)
        target = torch.zeros(self._size, CHANNELS, dtype=torch.float64, device="cpu")
        self._seen = _optional(state, "seen", seen)
        self._code = _optional(state, "code", code)
        applied = _optional(state, "applied", target.expand(3, -1, -1))
        self._applied = None if applied is None else Correction(*applied.unbind(0))
        self._block = [
            Sample(
                tensor_like(sample, "features", seen),
                tensor_like(sample, "code", code),
                tensor_like(sample, "surprise", target[:, :BASIS_SIZE]),
                (float(sample["shared"][0]), float(sample["shared"][1])),
            )
            for sample in state["block"]
        ]


def _optional(state: dict[str, Any], key: str, like: Tensor) -> Tensor | None:
    return None if state[key] is None else tensor_like(state, key, like)
