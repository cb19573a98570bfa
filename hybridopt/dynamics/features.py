"""What a learned model sees of one real step: a row of numbers per tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.dynamics.prior import PriorPredictor
from hybridopt.dynamics.state import tensor_like
from hybridopt.history import RunningMoments
from hybridopt.types import Observation

__all__ = ["ACTION_COUNT", "ACTIONS", "FEATURES", "FeatureExtractor", "symlog"]

FEATURES = (
    "alignment_step",  # cosine of -g with the last step
    "alignment_lag",  # cosine of -g with the filtered drift
    "t_step",  # running mean of alignment_step over its standard error
    "t_lag",
    "log_gradient_share",  # log ||g_l|| / ||g||
    "log_step_to_lag",  # log ||s_l|| / ||v_l||
    "log_gain_step",  # gain in force while this step's weights were reached
    "log_gain_lag",
    "log_lr_ratio",  # learning rate over that of the previous real step
    "moved_progress",  # progress expected of the moves since then, step equivalents
    "loss_surprise",  # residual of the loss against its trend, in sigma
    "loss_slope",  # slope of the trend per real step, in sigma
    "log_gradient_norm",  # against its own running mean
    "depth",  # position l / L in the parameter order
    "log_size",  # log10 of the number of elements
    "is_vector",  # one-hot of the number of dimensions: <= 1, 2, >= 3
    "is_matrix",
    "is_kernel",
)
"""Columns of the features, F of them. The first 8 are per tensor, the next 5 global,
the last 5 fixed. All but the fixed ones are symlog'ed, then standardized by running
moments pooled over tensors (renewed every 8 steps), then clipped to 5 deviations."""

ACTIONS = slice(6, 10)
ACTION_COUNT = 4
"""The columns that say what was done, not what was seen: gains, rate, moves."""

_FIXED = 5
_GLOBAL = 5
_LIMIT = 5.0
_TINY = 1e-60


def symlog(values: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), element by element.

    Source: Hafner et al. 2023 (DreamerV3, arXiv 2301.04104).
    """
    return values.abs().log1p_().copysign_(values)


class FeatureExtractor:
    """Turns observations into standardized (L, F) float32 rows, keeping the moments."""

    MEMORY = 0.92
    """Per renewal of the moments; 0.99 per step."""
    RENEWAL_STEPS = 8

    def __init__(self, sizes: Sequence[int], ndims: Sequence[int]) -> None:
        size = len(sizes)
        rows = [
            [
                2.0 * (index + 0.5) / size - 1.0,
                math.log10(max(numel, 1)) / 4.0 - 1.0,
                float(ndim <= 1),
                float(ndim == 2),
                float(ndim >= 3),
            ]
            for index, (numel, ndim) in enumerate(zip(sizes, ndims, strict=True))
        ]
        fixed = torch.tensor(rows, dtype=torch.float64, device="cpu")
        self._fixed = fixed.view(size, _FIXED)
        # (logs of ||g||, ||s||, ||v||, both gains) -> the four per-tensor logs.
        shares = [[1, 0, 0, 0], [0, 1, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        self._shares = torch.tensor(shares, dtype=torch.float64, device="cpu")
        self.reset()

    def reset(self) -> None:
        """Forget the moments."""
        moving = len(FEATURES) - _FIXED
        self._gradient_norm = RunningMoments(0.95)
        self._moments = torch.zeros(2, moving, dtype=torch.float64, device="cpu")
        self._count = 0
        self._waiting: list[Tensor] = []
        self._set_scale()

    def extract(
        self, observation: Observation, alignment: Tensor, prior: PriorPredictor
    ) -> Tensor:
        """(L, F) float32 features of one real step, always finite.

        Args:
            observation: The step.
            alignment: Its alignments, (L, J).
            prior: After it absorbed the step and before its gains grew.
        """
        gains = prior.gains
        positive = torch.cat(
            (
                observation.gradient_sq.unsqueeze(1),
                observation.basis_sq,
                gains.gains * gains.gains,
            ),
            1,
        )
        # Half the log of a square is the log.
        logs = positive.clamp_min_(_TINY).log_().mul_(0.5)
        norm = max(observation.gradient_norm, 1e-30)
        log_norm = math.log(norm) if math.isfinite(norm) else 0.0
        shared = torch.tensor(
            [-log_norm, 0.0, 0.0, 0.0, *self._shared(observation, prior, log_norm)],
            dtype=torch.float64,
            device="cpu",
        )
        raw = torch.cat(
            (
                alignment,
                gains.significance(),
                torch.addmm(shared[:4], logs, self._shares),
                shared[4:].expand(len(alignment), _GLOBAL),
            ),
            1,
        )
        moving = symlog(raw.nan_to_num_(0.0, 0.0, 0.0))
        return torch.cat((self._standardize(moving), self._fixed), 1).float()

    def _shared(
        self, observation: Observation, prior: PriorPredictor, log_norm: float
    ) -> list[float]:
        usual = self._gradient_norm.mean if self._gradient_norm.count else log_norm
        self._gradient_norm.add(log_norm)
        trend = prior.trend
        ratio = observation.lr_ratio
        slope = trend.slope / max(trend.sigma, 1e-12)
        return [
            math.log(ratio) if 0.0 < ratio < math.inf else 0.0,
            observation.moved_progress,
            trend.surprise,
            slope,
            log_norm - usual,
        ]

    def _standardize(self, values: Tensor) -> Tensor:
        self._waiting.append(values)
        if len(self._waiting) == self.RENEWAL_STEPS:
            self._renew(torch.cat(self._waiting))
            self._waiting = []
        return ((values - self._mean) * self._scale).clamp_(-_LIMIT, _LIMIT)

    def _renew(self, values: Tensor) -> None:
        pooled = torch.stack((values, values * values)).mean(1)
        self._count += 1
        weight = (1 - self.MEMORY) / (1 - self.MEMORY**self._count)
        self._moments = torch.lerp(self._moments, pooled, weight)
        self._set_scale()

    def _set_scale(self) -> None:
        mean, square = self._moments[0], self._moments[1]
        variance = torch.addcmul(square, mean, mean, value=-1).clamp_min(0.0)
        self._mean = mean
        # Before the first renewal the numbers go through as they are.
        known = self._count > 0
        self._scale = 1 / (variance.sqrt() + 1e-2) if known else torch.ones_like(mean)

    def state_dict(self) -> dict[str, Any]:
        """The running moments, and the rows that will renew them."""
        size, width = len(self._fixed), self._moments.shape[1]
        waiting = self._moments.new_empty(0, size, width)
        if self._waiting:
            waiting = torch.stack(self._waiting)
        return {
            "waiting": waiting,
            "count": self._count,
            "moments": self._moments.clone(),
            "gradient_norm": self._gradient_norm.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError, possibly half-way, on a mismatch."""
        self._count = int(state["count"])
        self._moments = tensor_like(state, "moments", self._moments)
        steps = len(state["waiting"])
        like = self._moments.new_empty(steps, len(self._fixed), self._moments.shape[1])
        self._waiting = list(tensor_like(state, "waiting", like).unbind(0))
        self._set_scale()
        self._gradient_norm.load_state_dict(state["gradient_norm"])
