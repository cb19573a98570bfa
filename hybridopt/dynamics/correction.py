"""What a learned model says about the prior, and the protocol such a model implements.

Everything is said in units of the prior's own forecast, so that zero means "as the
prior says" and an untrained model is exactly the prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "BLOCK_STEPS",
    "CHANNELS",
    "CHANNEL_EFFICIENCY",
    "CHANNEL_LOSS",
    "LOG_SCALE_LIMIT",
    "Correction",
    "Model",
    "bounded",
]

CHANNEL_LOSS = 2
"""Residual of the next loss against its trend, in the trend's sigma."""
CHANNEL_EFFICIENCY = 3
"""Residual of the next move's efficiency, in the spread of past efficiencies."""
CHANNELS = 4
"""Channels 0 and 1 are the alignments with the STEP and LAG directions: the residual
against the running mean, in running standard deviations."""
BLOCK_STEPS = 8
"""Most real steps that models learn from at once: per-step cost is what counts."""
LOG_SCALE_LIMIT = 1.5
"""Bound on log scales: a model may sharpen or blur the prior by a factor of 4.5."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A model's forecast of the next residuals; all (..., L, CHANNELS), float64."""

    mean: Tensor
    """Expected residual."""
    log_scale: Tensor
    """Log of the residual's standard deviation."""
    spread: Tensor
    """Epistemic standard deviation of ``mean``."""

    @classmethod
    def none(cls, size: int) -> Correction:
        """The correction of a model that has learned nothing: all zero."""
        zero = torch.zeros(size, CHANNELS, dtype=torch.float64, device="cpu")
        return cls(zero, zero, zero)


class Model(Protocol):
    """Maps the features of one real step to a correction of the prior, and learns."""

    @property
    def latent(self) -> Tensor | None:
        """(latent_size,) float64 summary of the recurrent state; None without one."""

    block_steps: int
    """Real steps that are learned from at once; weights change only then."""

    code_size: int
    """W, width of the codes."""

    def encode(self, features: Tensor) -> Tensor:
        """Take in one real step's (L, F) float32 features; (L, W) float32 of all that
        the correction depends on. Changes the recurrent state.
        """

    def decode(self, codes: Tensor) -> Correction:
        """What (..., L, W) codes say about the step after. Changes nothing."""

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Learn that ``features`` (T, L, F) of T successive steps were each followed
        by ``targets`` (T, L, CHANNELS), which are nan where not observed.
        """

    def imagine(self, horizon: int) -> Correction | None:
        """Mean over tensors of the next ``horizon`` corrections, (horizon, CHANNELS);
        None for models without dynamics. Changes nothing.
        """

    def restart(self) -> None:
        """The trajectory broke (a rollback): forget the sequence, keep what was
        learned.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next correction and the next update depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; may fail half-way with CheckpointError (the owner undoes it)."""


def bounded(log_scale: Tensor) -> Tensor:
    """Smoothly bounds log scales to ``LOG_SCALE_LIMIT``; exactly zero at zero."""
    return LOG_SCALE_LIMIT * torch.tanh(log_scale / LOG_SCALE_LIMIT)
