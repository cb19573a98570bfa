"""The RSSM at work: its state along the run, its ensemble, its online training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridopt.config import RSSM
from hybridopt.dynamics.correction import BLOCK_STEPS, Correction
from hybridopt.dynamics.features import ACTION_COUNT, ACTIONS
from hybridopt.dynamics.rssm import RSSMNetwork, State
from hybridopt.dynamics.state import seeded_generator, tensor_like
from hybridopt.dynamics.training import FlatNetwork, SampleRing

__all__ = ["RSSMModel"]


class RSSMModel:
    """One recurrent state per tensor, one network for all of them.

    The epistemic spread is the standard deviation of the ensemble's means. Each head
    learns from its own bootstrap of the steps: every (step, tensor) is shown to a head
    with probability one half, drawn once, when it is seen.
    """

    def __init__(self, config: RSSM, size: int, seed: int) -> None:
        self._config = config
        self._size = size
        self.block_steps = min(BLOCK_STEPS, config.train_interval_steps)
        self._generator = seeded_generator(seed)
        self.network = RSSMNetwork(config)
        self.code_size = config.hidden_size + self.network.latent_size
        self._weights = FlatNetwork(
            self.network.shapes,
            RSSMNetwork.ZERO,
            config.learning_rate,
            self._generator,
        )
        self._ring = SampleRing(size, config.ensemble_size)
        self.restart()

    def restart(self) -> None:
        """The trajectory broke: recurrent states start from zero again."""
        self._state = self.network.start(self._size)
        self._actions = torch.zeros(
            self._size, ACTION_COUNT, dtype=torch.float32, device="cpu"
        )
        self._ring.break_sequence()

    @property
    def latent(self) -> Tensor | None:
        """(hidden_size,) float64: the mean over tensors of h."""
        if self._size == 0:
            return None
        return self._state.hidden.mean(0).double()

    def encode(self, features: Tensor) -> Tensor:
        """Step the state by (L, F) features; h and z side by side."""
        weights = self._weights.weights
        self._state = self.network.observe(weights, self._state, features)
        self._actions = features[:, ACTIONS]
        return torch.cat((self._state.hidden, self._state.latent), 1)

    def decode(self, codes: Tensor) -> Correction:
        """What the ensemble expects after the states (..., L, h + z)."""
        mean, log_scale = self.network.predict(self._weights.weights, codes)
        spread, center = torch.std_mean(mean.double(), -2, correction=0)
        return Correction(center, log_scale.double().mean(-2), spread)

    def imagine(self, horizon: int) -> Correction | None:
        """Mean over tensors of the corrections of the next ``horizon`` steps,
        (horizon, CHANNELS). The first is that of the current state.
        """
        weights = self._weights.weights
        later = self.network.imagine(weights, self._state, self._actions, horizon - 1)
        states = (self._state, *later)
        codes = [torch.cat((state.hidden, state.latent), 1) for state in states]
        said = self.decode(torch.stack(codes))
        return Correction(
            said.mean.mean(1), said.log_scale.mean(1), said.spread.mean(1)
        )

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Keep a few steps; train once every ``train_interval_steps``."""
        config, ring = self._config, self._ring
        shape = (len(features), ring.tensors, config.ensemble_size)
        shown = torch.rand(
            shape, generator=self._generator, dtype=torch.float32, device="cpu"
        )
        due = ring.added // config.train_interval_steps
        ring.add(features, targets, (shown < 0.5).float())
        due = ring.added // config.train_interval_steps - due
        if due and len(ring) >= config.sequence_steps:
            self.train()

    def train(self) -> float:
        """One update on a batch of random sequences; returns the loss before it."""
        config = self._config
        sequences = self._ring.draw(
            config.batch_size, config.sequence_steps, self._generator
        )
        shape = (
            config.sequence_steps,
            config.batch_size,
            config.categoricals,
            config.classes,
        )
        uniform = torch.rand(
            shape, generator=self._generator, dtype=torch.float32, device="cpu"
        )
        noise = -uniform.clamp(1e-7, 1 - 1e-7).log()

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return self.network.loss(weights, sequences, noise)

        return self._weights.train(loss)

    def state_dict(self) -> dict[str, Any]:
        """Network, recurrent state, samples and random state."""
        return {
            "network": self._weights.state_dict(),
            "hidden": self._state.hidden.clone(),
            "latent": self._state.latent.clone(),
            "actions": self._actions.clone(),
            "ring": self._ring.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError, possibly half-way, on a mismatch."""
        drawn = tensor_like(state, "generator", self._generator.get_state())
        hidden = tensor_like(state, "hidden", self._state.hidden)
        latent = tensor_like(state, "latent", self._state.latent)
        actions = tensor_like(state, "actions", self._actions)
        self._weights.load_state_dict(state["network"])
        self._ring.load_state_dict(state["ring"])
        self._state, self._actions = State(hidden, latent), actions
        self._generator.set_state(drawn)
