"""A recurrent state-space model over per-tensor sequences, shared by all tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridopt.config import RSSM
from hybridopt.dynamics.correction import CHANNELS
from hybridopt.dynamics.features import ACTION_COUNT, ACTIONS, FEATURES
from hybridopt.dynamics.training import gaussian_loss, split_channels

__all__ = ["RSSMNetwork", "State"]

Weights = dict[str, Tensor]

DYNAMICS_WEIGHT = 1.0
REPRESENTATION_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class State:
    """Where B sequences are: what is carried from one real step to the next."""

    hidden: Tensor
    """h, (B, hidden_size)."""
    latent: Tensor
    """z, (B, categoricals * classes), one-hot per categorical."""


class RSSMNetwork:
    """The equations; weights come in, nothing is kept.

    With h the recurrent state, z the categorical latent, x the features and a those of
    them that say what was done (``ACTIONS``):

        h_t = GRU(h_t-1, z_t-1, a_t)            the cell, ``_core``
        z_t ~ p(z | h_t)                        prior: imagination
        z_t ~ q(z | h_t, embed(x_t))            posterior: observation
        heads(h_t, z_t) -> the next residuals   an ensemble; (decoder(h_t, z_t) -> x_t)

    Source: DreamerV3, Hafner et al. 2023, arXiv 2301.04104: update gate
    sigmoid(u - 1), unimix, straight-through one-hot, KL balance, free nats.
    Differs: two orders of magnitude smaller, no layer norm; the heads predict residuals
    of an analytic prior instead of rewards; inference takes the latent's mode, so that
    forecasts are deterministic.
    """

    ZERO = frozenset({"heads", "decoder"})

    def __init__(self, config: RSSM) -> None:
        self.config = config
        hidden, latent = config.hidden_size, config.categoricals * config.classes
        width = len(FEATURES)
        outputs = config.ensemble_size * 2 * CHANNELS
        self.latent_size = latent
        self.shapes: dict[str, tuple[int, ...]] = {
            "embed": (width, hidden),
            "embed_bias": (hidden,),
            "cell": (hidden + latent, 3 * hidden),
            "cell_actions": (ACTION_COUNT, 3 * hidden),
            "cell_bias": (3 * hidden,),
            "prior": (hidden, latent),
            "prior_bias": (latent,),
            "posterior": (hidden, latent),
            "posterior_embed": (hidden, latent),
            "posterior_bias": (latent,),
            "decoder": (hidden + latent, width),
            "decoder_bias": (width,),
            "heads": (hidden + latent, outputs),
            "heads_bias": (outputs,),
        }
        """Shape per weight; matrices are (inputs, outputs)."""
        # Subtracted from the update gate: remembering is the default of a fresh cell.
        self._offset = torch.zeros(3 * hidden, dtype=torch.float32, device="cpu")
        self._offset[2 * hidden :] = 1.0
        self._one_hot = torch.eye(config.classes, dtype=torch.float32, device="cpu")

    def start(self, size: int) -> State:
        """The state of ``size`` sequences before their first step: all zero."""
        return State(
            torch.zeros(
                size, self.config.hidden_size, dtype=torch.float32, device="cpu"
            ),
            torch.zeros(size, self.latent_size, dtype=torch.float32, device="cpu"),
        )

    # -- observe, imagine, loss ---------------------------------------------------

    def observe(self, weights: Weights, state: State, features: Tensor) -> State:
        """Step (B, F) features into the state, with the posterior's mode as latent."""
        drive = self._drive(weights, features[:, ACTIONS])
        hidden = self._core(weights, state.hidden, state.latent, drive)
        logits = self._posterior(weights, hidden, self._evidence(weights, features))
        return State(hidden, self._mode(logits))

    def imagine(
        self, weights: Weights, state: State, actions: Tensor, horizon: int
    ) -> list[State]:
        """The next ``horizon`` states by the prior's mode, the actions held fixed."""
        states = []
        drive = self._drive(weights, actions)
        for _ in range(horizon):
            hidden = self._core(weights, state.hidden, state.latent, drive)
            logits = torch.addmm(weights["prior_bias"], hidden, weights["prior"])
            state = State(hidden, self._mode(logits))
            states.append(state)
        return states

    def predict(self, weights: Weights, states: Tensor) -> tuple[Tensor, Tensor]:
        """What each head expects.

        Args:
            weights: The weights.
            states: (..., hidden + latent), h and z side by side.

        Returns:
            Means and log scales of the next residuals, (..., ensemble, CHANNELS).
        """
        output = states @ weights["heads"] + weights["heads_bias"]
        return split_channels(
            output.view(*output.shape[:-1], self.config.ensemble_size, 2 * CHANNELS)
        )

    def loss(
        self,
        weights: Weights,
        sequences: tuple[Tensor, Tensor, Tensor, Tensor],
        noise: Tensor,
    ) -> Tensor:
        """Prediction, reconstruction and both KL terms of a batch of sequences.

        Args:
            weights: The weights.
            sequences: Features (T, B, F), targets (T, B, CHANNELS), bootstrap masks
                (T, B, ensemble), and (T, B) bool that is True where a sequence starts.
            noise: (T, B, categoricals, classes) independent standard exponentials e:
                the class that maximizes p / e is a sample of p.
        """
        features, targets, masks, first = sequences
        hidden, latent, logits = self._unroll(weights, features, first, noise)
        states = torch.cat((hidden, latent), -1)
        mean, log_scale = self.predict(weights, states)
        nll = gaussian_loss(mean, log_scale, targets.unsqueeze(-2))
        predicted = (nll.sum(-1) * masks).sum() / masks.sum().clamp_min(1.0)
        decoded = states @ weights["decoder"] + weights["decoder_bias"]
        rebuilt = 0.5 * (decoded - features).square().mean()
        prior = hidden @ weights["prior"] + weights["prior_bias"]
        after, before = self._mix(logits), self._mix(prior)
        free = self.config.free_nats
        dynamics = self._divergence(after.detach(), before)
        representation = self._divergence(after, before.detach())
        return (
            predicted
            + rebuilt
            + DYNAMICS_WEIGHT * dynamics.clamp_min(free).mean()
            + REPRESENTATION_WEIGHT * representation.clamp_min(free).mean()
        )

    # -- parts -------------------------------------------------------------------------

    def _drive(self, weights: Weights, actions: Tensor) -> Tensor:
        """What (..., A) actions add to the cell's gates, biases included.

        Apart from the cell, so that a whole sequence of it is one product.
        """
        bias = weights["cell_bias"] - self._offset
        return actions @ weights["cell_actions"] + bias

    @staticmethod
    def _core(
        weights: Weights, hidden: Tensor, latent: Tensor, drive: Tensor
    ) -> Tensor:
        """The GRU cell: h_t from h_t-1, z_t-1 and the drive of a_t."""
        inputs = torch.cat((hidden, latent), 1)
        gates = torch.addmm(drive, inputs, weights["cell"])
        reset, candidate, update = gates.chunk(3, 1)
        candidate = torch.tanh(reset.sigmoid() * candidate)
        return torch.lerp(hidden, candidate, update.sigmoid())

    @staticmethod
    def _evidence(weights: Weights, features: Tensor) -> Tensor:
        """What (..., F) features add to the posterior's logits, biases included."""
        embedded = F.silu(features @ weights["embed"] + weights["embed_bias"])
        return embedded @ weights["posterior_embed"] + weights["posterior_bias"]

    @staticmethod
    def _posterior(weights: Weights, hidden: Tensor, evidence: Tensor) -> Tensor:
        return torch.addmm(evidence, hidden, weights["posterior"])

    def _classes(self, logits: Tensor) -> Tensor:
        """(..., latent) as (..., categoricals, classes)."""
        config = self.config
        return logits.view(*logits.shape[:-1], config.categoricals, config.classes)

    def _mode(self, logits: Tensor) -> Tensor:
        """The likeliest class of each categorical, one-hot, flattened."""
        return self._one_hot[self._classes(logits).argmax(-1)].flatten(-2)

    def _mix(self, logits: Tensor) -> Tensor:
        """Probabilities (..., categoricals, classes), the uniform ones mixed in."""
        unimix = self.config.unimix
        softmax = self._classes(logits).softmax(-1)
        return (1 - unimix) * softmax + unimix / self.config.classes

    @staticmethod
    def _divergence(p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) in nats, summed over the categoricals."""
        # Without unimix a probability may underflow to zero.
        ratio = p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log()
        return (p * ratio).sum((-2, -1))

    def _unroll(
        self, weights: Weights, features: Tensor, first: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior pass over T steps: h and z (T, B, ...), posterior logits."""
        evidence = self._evidence(weights, features).unbind(0)
        drive = self._drive(weights, features[..., ACTIONS]).unbind(0)
        begin = self.start(features.shape[1])
        hidden, latent = begin.hidden, begin.latent
        keep = (~first).float().unsqueeze(-1)
        # Rollbacks are rare; without one inside the batch nothing needs masking.
        breaks = first[1:].any(1).tolist()
        every: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for t in range(len(features)):
            if t and breaks[t - 1]:
                hidden, latent = hidden * keep[t], latent * keep[t]
            hidden = self._core(weights, hidden, latent, drive[t])
            logits = self._posterior(weights, hidden, evidence[t])
            latent = self._sample(logits, noise[t])
            for kept, value in zip(every, (hidden, latent, logits), strict=True):
                kept.append(value)
        return torch.stack(every[0]), torch.stack(every[1]), torch.stack(every[2])

    def _sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """A one-hot sample whose gradient is that of the probabilities."""
        mix = self._mix(logits)
        fixed = mix.detach()
        drawn = self._one_hot[(fixed / noise).argmax(-1)]
        return (mix + (drawn - fixed)).flatten(-2)
