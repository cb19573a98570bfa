"""Turns past residuals into a correction of the next prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import HybridConfig, ResidualConfig
from hybridopt.errors import CheckpointError
from hybridopt.residuals.lowrank import LowRankResidual
from hybridopt.residuals.store import ResidualStore
from hybridopt.residuals.trust import TrustWeights

__all__ = ["SimilarityCorrector", "build_corrector"]

STORE_BYTES = 4 * 2**20
"""Most host memory for residuals in coefficient space; thousands of tensors fit."""
SCALE_RESIDUALS = 8
"""Newest residuals that say how large coefficients are now."""
LARGEST_RELATIVE = 4.0
"""Bound on a residual relative to its coefficients; beyond it is an accident."""


def build_corrector(
    config: ResidualConfig,
    memory_budget: float = HybridConfig().memory_budget,
    seed: int = 0,
) -> SimilarityCorrector:
    """The corrector that the configuration describes; untrained it corrects nothing.

    Args:
        config: Capacity, temperature, rank.
        memory_budget: MiB for weight-space factors.
        seed: Of the factors' first basis.
    """
    return SimilarityCorrector(config, memory_budget, seed)


class SimilarityCorrector:
    """Similarity-weighted mean of past residuals, scaled by learned trust.

    With residual i made relative per direction j, r_i = (ideal_i - predicted_i) / s_i,
    s_i,j^2 = mean over tensors of (predicted_i^2 + ideal_i^2) / 2, and s the mean of
    s_i over the newest residuals, the correction in latent state h is

        w_j s_j sum_i p_i r_i,lj,   p = softmax(-||h_i - h||^2 / (temperature d)),

    d the median of ||h_i - h||^2 over the stored residuals. Relative residuals carry
    over when gains grow by orders of magnitude. The trust w in [0, 1] starts at 0 and
    is learned from what each correction would have done to the residual that came
    next (``TrustWeights``), so a corrector that does not help fades out.

    On request it also keeps the newest residual in weight space as low-rank factors,
    when ``rank`` is positive and they fit into ``memory_budget``.

    Args:
        config: Capacity, temperature, rank.
        memory_budget: MiB for weight-space factors.
        seed: Of the factors' first basis.
    """

    def __init__(
        self, config: ResidualConfig, memory_budget: float, seed: int = 0
    ) -> None:
        self.config = config
        self.memory_budget = memory_budget
        self.store = ResidualStore(config.capacity, STORE_BYTES)
        self.trust = TrustWeights(0)
        self.factors: LowRankResidual | None = None
        self.weight_trust = TrustWeights(1)
        self._seed = seed
        self._factors_state: dict[str, Any] | None = None
        self._relate_all()

    # -- coefficient space ----------------------------------------------------------

    def correction(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """(L, J) to add to the next coefficients; zeros when nothing is known.

        Args:
            latent: (k,) the predictor's latent state now.
            size: (L, J).
        """
        full = self._untrusted(_on_host(latent), size)
        if full is None:
            return torch.zeros(size, dtype=torch.float64)
        return full * self.trust.weights

    def update(self, latent: Tensor, predicted: Tensor, ideal: Tensor) -> None:
        """Learn from one residual. Anything that is not finite is left out.

        Args:
            latent: (k,) the predictor's latent state when it predicted.
            predicted: (L, J) its coefficients **before** any correction: residuals of
                corrected predictions would unlearn what the correction removes.
            ideal: (L, J) coefficients that would have been right.
        """
        latent, predicted, ideal = map(_on_host, (latent, predicted, ideal))
        if not all(bool(t.isfinite().all()) for t in (latent, predicted, ideal)):
            return
        size = (predicted.shape[0], predicted.shape[1])
        if self.trust.size != size[1]:
            self.trust = TrustWeights(size[1])
        would_be = self._untrusted(latent, size)
        if would_be is not None:
            missing = ideal - predicted
            self.trust.update(
                (would_be * missing).sum(0),
                would_be.square().sum(0),
                missing.square().sum(0),
            )
        if self.store.add(latent, predicted, ideal):
            if self._relative.shape != (self.store.slots, *size):
                self._relate_all()
            else:
                self._relate(self.store.newest(1)[0])

    def _untrusted(self, latent: Tensor, size: tuple[int, int]) -> Tensor | None:
        """(L, J) correction at full trust; None when no stored residual applies."""
        store = self.store
        fits = store.size == size and store.latents.shape[1:] == latent.shape
        if len(store) == 0 or not fits or not bool(latent.isfinite().all()):
            return None
        distance = (store.latents - latent).square().sum(1)
        spread = self.config.temperature * float(distance.median())
        # All alike (spread 0): nothing to tell them apart by, so all count the same.
        share = torch.softmax(-distance / spread if spread > 0 else 0 * distance, 0)
        now = self._scale[store.newest(SCALE_RESIDUALS)].mean(0)
        relative = self._relative[: len(store)].flatten(1)
        return now * (share @ relative).view(size)

    def _relate_all(self) -> None:
        """Relative residuals and scales of everything stored, slot by slot.

        They follow from the store; kept because a correction is due at every move and
        a new residual changes one slot. Slot by slot, so that a resumed run has the
        same bits.
        """
        slots, size = self.store.slots, self.store.size
        self._relative = torch.zeros(slots, *size, dtype=torch.float64)
        self._scale = torch.zeros(slots, size[1], dtype=torch.float64)
        for slot in range(len(self.store)):
            self._relate(slot)

    def _relate(self, slot: int) -> None:
        predicted, ideal = self.store.predicted[slot], self.store.ideal[slot]
        scale = ((predicted.square() + ideal.square()).mean(0) / 2).sqrt()
        relative = (ideal - predicted) / scale.clamp_min(1e-300)
        self._relative[slot] = relative.clamp(-LARGEST_RELATIVE, LARGEST_RELATIVE)
        self._scale[slot] = scale

    # -- weight space ---------------------------------------------------------------

    def update_weights(self, residuals: Sequence[Tensor]) -> bool:
        """Keep a residual in weight space: ideal minus predicted weights per tensor.

        Args:
            residuals: One per parameter tensor, on its device; read, not kept.

        Returns:
            Whether it was kept: not with rank 0, without room in the memory budget, or
            with NaN or inf in it.
        """
        if self.factors is None:
            self.factors = self._build_factors(residuals)
        if self.factors is None:
            return False
        before = self.factors.decompress()
        if not self.factors.compress(residuals):
            return False
        pairs = list(zip(before, residuals, strict=True))
        sums = [
            torch.stack([(c * e).sum(), (c * c).sum(), (e * e).sum()]).double().cpu()
            for c, e in ((c, r.detach().float()) for c, r in pairs if r.ndim >= 2)
        ]
        if sums and float(sum(s[1] for s in sums)) > 0:
            product, correction_sq, residual_sq = torch.stack(sums).sum(0)
            self.weight_trust.update(
                product[None], correction_sq[None], residual_sq[None]
            )
        return True

    def weight_correction(self, like: Sequence[Tensor]) -> list[Tensor] | None:
        """What to add to the next prediction in weight space, per tensor, float32.

        ``like`` has the tensors' shapes: factors from a checkpoint are made by them.
        None while no residual is kept; zeros for vectors and while trust is 0.
        """
        if self.factors is None and self._factors_state is not None:
            self.factors = self._build_factors(like)
        if self.factors is None:
            return None
        trust = float(self.weight_trust.weights)
        return [trust * t for t in self.factors.decompress()]

    def _build_factors(self, like: Sequence[Tensor]) -> LowRankResidual | None:
        """Factors with error feedback if they fit, else without, else none."""
        rank, limit = self.config.rank, self.memory_budget * 2**20
        if rank == 0:
            return None
        for feedback in (True, False):
            size = LowRankResidual.measure_bytes(like, rank, error_feedback=feedback)
            if size <= limit:
                factors = LowRankResidual(
                    like, rank, seed=self._seed, error_feedback=feedback
                )
                if self._factors_state is not None:
                    factors.load_state_dict(self._factors_state)
                    self._factors_state = None
                return factors
        return None

    # -- state ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Store, trust, and the weight-space factors where there are any."""
        factors = self._factors_state
        if self.factors is not None:
            factors = self.factors.state_dict()
        return {
            "store": self.store.state_dict(),
            "trust": self.trust.state_dict(),
            "weight_trust": self.weight_trust.state_dict(),
            "factors": factors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Factors that are saved before this object has seen any weights are checked when
        it first does, by ``update_weights``.

        Raises:
            CheckpointError: Something does not fit; nothing was changed.
        """
        names = ("store", "trust", "weight_trust", "factors")
        if not isinstance(state, dict) or set(state) != set(names):
            raise CheckpointError(
                f"state of the corrector: must have exactly the keys {sorted(names)}. "
                "Load with the version that the checkpoint was saved with."
            )
        fresh = SimilarityCorrector(self.config, self.memory_budget, self._seed)
        fresh.store.load_state_dict(state["store"])
        fresh._relate_all()
        fresh.trust.load_state_dict(state["trust"])
        fresh.weight_trust.load_state_dict(state["weight_trust"])
        if self.factors is not None and state["factors"] is not None:
            self.factors.load_state_dict(state["factors"])
            fresh.factors = self.factors
        else:
            fresh._factors_state = state["factors"]
        vars(self).update(vars(fresh))


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)
