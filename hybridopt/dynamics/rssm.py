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
            "cell": (hidden + latent + ACTION_COUNT, 3 * hidden),
            "cell_bias": (3 * hidden,),
            "prior": (hidden, latent),
            "prior_bias": (latent,),
            "posterior": (2 * hidden, latent),
            "posterior_bias": (latent,),
            "decoder": (hidden + latent, width),
            "decoder_bias": (width,),
            "heads": (hidden + latent, outputs),
            "heads_bias": (outputs,),
        }
        """Shape per weight; matrices are (inputs, outputs)."""
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
        actions = features[:, ACTIONS]
        hidden = self._core(weights, state.hidden, state.latent, actions)
        logits = self._posterior(weights, hidden, self._embed(weights, features))
        return State(hidden, self._mode(logits))

    def imagine(
        self, weights: Weights, state: State, actions: Tensor, horizon: int
    ) -> list[State]:
        """The next ``horizon`` states by the prior's mode, the actions held fixed."""
        states = []
        for _ in range(horizon):
            hidden = self._core(weights, state.hidden, state.latent, actions)
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
            noise: (T, B, categoricals, classes) standard Gumbel noise: the latents'
                samples.
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
        posterior_log, prior_log = self._log_mix(logits), self._log_mix(prior)
        free = self.config.free_nats
        dynamics = self._divergence(posterior_log.detach(), prior_log)
        representation = self._divergence(posterior_log, prior_log.detach())
        return (
            predicted
            + rebuilt
            + DYNAMICS_WEIGHT * dynamics.clamp_min(free).mean()
            + REPRESENTATION_WEIGHT * representation.clamp_min(free).mean()
        )

    # -- parts -------------------------------------------------------------------------

    @staticmethod
    def _core(
        weights: Weights, hidden: Tensor, latent: Tensor, actions: Tensor
    ) -> Tensor:
        """The GRU cell: h_t from h_t-1, z_t-1 and a_t."""
        inputs = torch.cat((hidden, latent, actions), 1)
        gates = torch.addmm(weights["cell_bias"], inputs, weights["cell"])
        reset, candidate, update = gates.chunk(3, 1)
        candidate = torch.tanh(reset.sigmoid() * candidate)
        # The offset makes remembering the default, as a fresh cell should.
        return torch.lerp(hidden, candidate, (update - 1.0).sigmoid())

    @staticmethod
    def _embed(weights: Weights, features: Tensor) -> Tensor:
        return F.silu(features @ weights["embed"] + weights["embed_bias"])

    @staticmethod
    def _posterior(weights: Weights, hidden: Tensor, embedded: Tensor) -> Tensor:
        inputs = torch.cat((hidden, embedded), 1)
        return torch.addmm(weights["posterior_bias"], inputs, weights["posterior"])

    def _classes(self, logits: Tensor) -> Tensor:
        """(..., latent) as (..., categoricals, classes)."""
        config = self.config
        return logits.view(*logits.shape[:-1], config.categoricals, config.classes)

    def _mode(self, logits: Tensor) -> Tensor:
        """The likeliest class of each categorical, one-hot, flattened."""
        return self._one_hot[self._classes(logits).argmax(-1)].flatten(-2)

    def _log_mix(self, logits: Tensor) -> Tensor:
        """Log probabilities (..., categoricals, classes), unimix mixed in."""
        unimix = self.config.unimix
        mixed = (1 - unimix) * self._classes(logits).softmax(-1)
        mixed = mixed + unimix / self.config.classes
        # Without unimix a probability may underflow to zero.
        return mixed.clamp_min(1e-12).log()

    @staticmethod
    def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        """KL(p || q) in nats, summed over the categoricals."""
        return (log_p.exp() * (log_p - log_q)).sum((-2, -1))

    def _unroll(
        self, weights: Weights, features: Tensor, first: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior pass over T steps: h and z (T, B, ...), posterior logits."""
        embedded = self._embed(weights, features)
        actions = features[..., ACTIONS]
        begin = self.start(features.shape[1])
        hidden, latent = begin.hidden, begin.latent
        keep = (~first).float().unsqueeze(-1)
        # Rollbacks are rare; without one inside the batch nothing needs masking.
        breaks = first[1:].any(1).tolist()
        every: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for t in range(len(features)):
            if t and breaks[t - 1]:
                hidden, latent = hidden * keep[t], latent * keep[t]
            hidden = self._core(weights, hidden, latent, actions[t])
            logits = self._posterior(weights, hidden, embedded[t])
            latent = self._sample(logits, noise[t])
            for kept, value in zip(every, (hidden, latent, logits), strict=True):
                kept.append(value)
        return torch.stack(every[0]), torch.stack(every[1]), torch.stack(every[2])

    def _sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """A one-hot sample whose gradient is that of the probabilities."""
        log_mix = self._log_mix(logits)
        mix = log_mix.exp()
        drawn = self._one_hot[(log_mix.detach() + noise).argmax(-1)]
        return (drawn + mix - mix.detach()).flatten(-2)
