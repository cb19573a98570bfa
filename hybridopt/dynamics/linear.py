"""Online ridge regression on the features of the newest real step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridopt.config import Linear
from hybridopt.dynamics.correction import (
    BLOCK_STEPS,
    CHANNELS,
    LOG_SCALE_LIMIT,
    Correction,
)
from hybridopt.dynamics.features import FEATURES
from hybridopt.dynamics.state import tensor_like

__all__ = ["LinearModel"]

_WIDTH = len(FEATURES) + 1


class LinearModel:
    """Discounted ridge regression of the residuals, solved anew every few real steps.

    With x a tensor's features and a constant, y its residuals, averages over tensors,
    and memory gamma:

        A <- gamma A + mean(x x'),  B <- gamma B + mean(x y'),
        W = (A + lambda I)^-1 B,  lambda = ridge trace(A) / (n (F + 1)),

    n the discounted count of steps: the penalty is worth ``ridge`` average steps. The
    log scale of a channel is that of its one-step-ahead errors, the spread that of the
    estimate, sigma sqrt(x' (A + lambda I)^-1 x).

    Source: recursive least squares with exponential forgetting.
    """

    block_steps = BLOCK_STEPS
    code_size = len(FEATURES)
    MINIMUM_STEPS = 8
    """Steps before anything is said."""

    latent: Tensor | None = None
    """None: the model has no state that would tell situations apart."""

    def __init__(self, config: Linear, size: int) -> None:
        self._config = config
        self._steps = 0
        self._gram = self._zeros(_WIDTH, _WIDTH)
        self._cross = self._zeros(_WIDTH, CHANNELS)
        self._errors = self._zeros(2, CHANNELS)
        self._solve()

    @staticmethod
    def _zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")

    def _solve(self) -> None:
        """Weights and factor from the running sums."""
        memory = self._config.memory
        count = (1 - memory**self._steps) / (1 - memory) if self._steps else 1.0
        mean_square = float(self._gram.diagonal().mean()) / count
        penalty = self._config.ridge * max(mean_square, 1e-6)
        eye = torch.eye(_WIDTH, dtype=torch.float64, device="cpu")
        self._factor = torch.linalg.cholesky(self._gram + penalty * eye)
        self._weights = torch.cholesky_solve(self._cross, self._factor)

    @staticmethod
    def _inputs(features: Tensor) -> Tensor:
        """(samples, F + 1) float64: the features and a constant."""
        flat = features.reshape(-1, features.shape[-1]).double()
        return F.pad(flat, (0, 1), value=1.0)

    def _sigma(self) -> Tensor:
        """(CHANNELS,) root mean square of the one-step-ahead errors; 1 at first."""
        square, weight = self._errors[0], self._errors[1]
        known = square / weight.clamp_min(1e-12)
        return torch.where(weight > 0, known, 1.0).sqrt()

    def encode(self, features: Tensor) -> Tensor:
        """The features themselves: there is no state."""
        return features

    def decode(self, codes: Tensor) -> Correction:
        """What (..., L, F) features say about the step after."""
        shape = (*codes.shape[:-1], CHANNELS)
        if self._steps < self.MINIMUM_STEPS:
            zero = self._zeros(*shape)
            return Correction(zero, zero, zero)
        inputs = self._inputs(codes)
        sigma = self._sigma()
        bound = LOG_SCALE_LIMIT
        log_scale = (
            sigma.clamp_min(1e-6).log().clamp(-bound, bound).expand(len(inputs), -1)
        )
        half = torch.linalg.solve_triangular(self._factor, inputs.T, upper=False)
        leverage = half.square().sum(0).sqrt()
        spread = torch.outer(leverage, sigma)
        mean = inputs @ self._weights
        return Correction(mean.view(shape), log_scale.view(shape), spread.view(shape))

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Add a few steps to the sums and solve; within them nothing is discounted."""
        steps, size = features.shape[:2]
        memory = self._config.memory**steps
        inputs = self._inputs(features)
        said = inputs @ self._weights
        targets = targets.reshape(-1, CHANNELS)
        known = ~targets.isnan()
        # A target that was not observed teaches nothing: stand-in is what was said.
        filled = torch.where(known, targets, said)
        square = (filled - said).square().sum(0)
        counts = known.sum(0)
        sample = torch.stack((square, counts.double())) / size
        self._errors = torch.where(
            counts > 0, memory * self._errors + sample, self._errors
        )
        self._gram = memory * self._gram + inputs.T @ inputs / size
        self._cross = memory * self._cross + inputs.T @ filled / size
        self._steps += steps
        self._solve()

    def imagine(self, horizon: int) -> Correction | None:
        """None: there are no dynamics to roll forward."""
        return None

    def restart(self) -> None:
        """Samples do not depend on their order, so a break in the run costs nothing."""
        return

    def state_dict(self) -> dict[str, Any]:
        """The running sums; weights follow from them."""
        return {
            "steps": self._steps,
            "gram": self._gram.clone(),
            "cross": self._cross.clone(),
            "errors": self._errors.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError, possibly half-way, on a mismatch."""
        gram = tensor_like(state, "gram", self._gram)
        cross = tensor_like(state, "cross", self._cross)
        errors = tensor_like(state, "errors", self._errors)
        self._steps = int(state["steps"])
        self._gram, self._cross, self._errors = gram, cross, errors
        self._solve()
