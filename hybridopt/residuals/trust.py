"""How far to trust a correction: a weight in [0, 1] learned online."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import CheckpointError

__all__ = ["TrustWeights"]

RATE = 1.0
"""alpha, scale of the per-coordinate step size."""
SMOOTHING = 1.0
"""beta, steps (in units of squared gradient) before the step size shrinks."""
PENALTY = 0.3
"""lambda_1, evidence below which a weight stays exactly 0."""


class TrustWeights:
    """One weight per direction, learned by FTRL-proximal; 0 until evidence says more.

    Direction j of a correction c should have left ||e_j - w_j c_j||^2 of the residual
    e. Its gradient, made free of scale,

        g_j = -<c_j, e_j - w_j c_j> / (||c_j||^2 + ||e_j||^2),

    enters z_j and n_j with sigma = (sqrt(n + g^2) - sqrt(n)) / alpha:
    z <- z + g - sigma w, n <- n + g^2, and

        w = clip((-z - lambda_1) / ((beta + sqrt(n)) / alpha), 0, 1).

    Source: McMahan et al. 2013, Ad Click Prediction, KDD, algorithm 1. Differs: squared
    loss, no L2 penalty, and w is confined to [0, 1].

    Args:
        size: Number of directions.
    """

    def __init__(self, size: int) -> None:
        self._z = torch.zeros(size, dtype=torch.float64)
        self._n = torch.zeros(size, dtype=torch.float64)

    @property
    def size(self) -> int:
        """Number of directions."""
        return self._z.shape[0]

    @property
    def weights(self) -> Tensor:
        """(size,) float64 in [0, 1]."""
        evidence = (-self._z - PENALTY).clamp_min(0.0)
        return (evidence * RATE / (SMOOTHING + self._n.sqrt())).clamp(0.0, 1.0)

    def update(
        self, product: Tensor, correction_sq: Tensor, residual_sq: Tensor
    ) -> None:
        """Learn from one residual and the correction that would have met it.

        Args:
            product: (size,) <c_j, e_j>.
            correction_sq: (size,) ||c_j||^2.
            residual_sq: (size,) ||e_j||^2.

        Directions without a correction, and values that are not finite, teach nothing.
        """
        weights = self.weights
        scale = (correction_sq + residual_sq).clamp_min(1e-300)
        gradient = -(product - weights * correction_sq) / scale
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        grown = self._n + gradient * gradient
        self._z = self._z + gradient - (grown.sqrt() - self._n.sqrt()) / RATE * weights
        self._n = grown

    def state_dict(self) -> dict[str, Any]:
        """The sums z and n."""
        return {"z": self._z.clone(), "n": self._n.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore any size; CheckpointError and no change on broken values."""
        z, n = (state.get(k) if isinstance(state, dict) else None for k in ("z", "n"))
        for value in (z, n):
            if (
                not isinstance(value, Tensor)
                or value.ndim != 1
                or value.dtype != torch.float64
                or not bool(value.isfinite().all())
            ):
                raise _mismatch("z and n must be finite float64 vectors")
        assert isinstance(z, Tensor)
        assert isinstance(n, Tensor)
        if z.shape != n.shape or bool((n < 0).any()):
            raise _mismatch("z and n must have one length and n no negative value")
        self._z, self._n = z.clone(), n.clone()


def _mismatch(rule: str) -> CheckpointError:
    return CheckpointError(
        f"state of the corrector's trust: {rule}. "
        "Load with the version that the checkpoint was saved with."
    )
