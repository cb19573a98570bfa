"""A small multilayer perceptron on the features of the newest real step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridopt.config import MLP
from hybridopt.dynamics.correction import BLOCK_STEPS, CHANNELS, Correction
from hybridopt.dynamics.features import FEATURES
from hybridopt.dynamics.state import seeded_generator, tensor_like
from hybridopt.dynamics.training import (
    FlatNetwork,
    SampleRing,
    gaussian_loss,
    split_channels,
)

__all__ = ["MLPModel"]


class MLPModel:
    """Two hidden layers, one Gaussian per channel; no memory, no epistemic spread."""

    BATCH_SIZE = 256

    code_size = len(FEATURES)

    latent: Tensor | None = None
    """None: the model has no state that would tell situations apart."""

    def __init__(self, config: MLP, size: int, seed: int) -> None:
        self._interval = config.train_interval_steps
        self.block_steps = min(BLOCK_STEPS, self._interval)
        self._generator = seeded_generator(seed)
        width = config.hidden_size
        shapes = {
            "first": (len(FEATURES), width),
            "first_bias": (width,),
            "second": (width, width),
            "second_bias": (width,),
            "output": (width, 2 * CHANNELS),
            "output_bias": (2 * CHANNELS,),
        }
        self._network = FlatNetwork(
            shapes, frozenset({"output"}), config.learning_rate, self._generator
        )
        self._ring = SampleRing(size, 0)

    @staticmethod
    def _forward(weights: dict[str, Tensor], features: Tensor) -> Tensor:
        hidden = F.silu(torch.addmm(weights["first_bias"], features, weights["first"]))
        hidden = F.silu(torch.addmm(weights["second_bias"], hidden, weights["second"]))
        return torch.addmm(weights["output_bias"], hidden, weights["output"])

    def encode(self, features: Tensor) -> Tensor:
        """The features themselves: there is no state."""
        return features

    def decode(self, codes: Tensor) -> Correction:
        """What (..., L, F) features say about the step after."""
        flat = codes.reshape(-1, codes.shape[-1])
        output = self._forward(self._network.weights, flat).double()
        mean, log_scale = split_channels(output.view(*codes.shape[:-1], -1))
        return Correction(mean, log_scale, torch.zeros_like(mean))

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Keep a few steps; train once every ``train_interval_steps``."""
        due = self._ring.added // self._interval
        self._ring.add(features, targets, None)
        if self._ring.added // self._interval > due:
            self.train()

    def train(self) -> float:
        """One update on random samples; returns the loss before it."""
        features, targets, _, _ = self._ring.draw(self.BATCH_SIZE, 1, self._generator)

        def loss(weights: dict[str, Tensor]) -> Tensor:
            mean, log_scale = split_channels(self._forward(weights, features[0]))
            return gaussian_loss(mean, log_scale, targets[0]).mean()

        return self._network.train(loss)

    def imagine(self, horizon: int) -> Correction | None:
        """None: there are no dynamics to roll forward."""
        return None

    def restart(self) -> None:
        """Nothing to forget; samples do not depend on their order."""
        self._ring.break_sequence()

    def state_dict(self) -> dict[str, Any]:
        """Network, samples and random state."""
        return {
            "network": self._network.state_dict(),
            "ring": self._ring.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError, possibly half-way, on a mismatch."""
        drawn = tensor_like(state, "generator", self._generator.get_state())
        self._network.load_state_dict(state["network"])
        self._ring.load_state_dict(state["ring"])
        self._generator.set_state(drawn)
