"""Weight-shaped residuals as low-rank factors: PowerSGD compression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import CheckpointError, ConfigError

__all__ = ["LowRankResidual"]


class LowRankResidual:
    """Keeps the newest residual of every weight matrix as two thin factors.

    A residual tensor is viewed as M (n, m), n its first dimension and m all others.
    With the error E of the last compression fed back and Q (m, r) from it,

        M <- M + E,  P <- orthonormal basis of M Q,  Q <- M' P,  E <- M - P Q',

    one step of a power iteration that the warm start carries on from call to call: on
    a matrix that stays the same, P Q' approaches the best rank-r approximation.
    Tensors with fewer than two dimensions, and empty ones, are skipped and decompress
    to zeros. Tensors of equal n, m and device are handled as one batch.

    Memory: r (n + m) float32 per matrix, and n m more for E with error feedback.

    Source: Vogels et al. 2019, arXiv 1905.13727, algorithms 1 and 2. Differs: one
    worker, so no reduction; QR instead of Gram-Schmidt; vectors skipped, not sent.

    Args:
        like: Tensors whose shapes and devices the residuals will have. Not kept.
        rank: r; per matrix at most min(n, m).
        seed: Of the first Q.
        error_feedback: Whether what one compression misses is added to the next.

    Raises:
        ConfigError: ``rank`` below 1.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        rank: int,
        *,
        seed: int = 0,
        error_feedback: bool = True,
    ) -> None:
        if rank < 1:
            raise ConfigError(f"rank={rank}: must be >= 1. Use rank 0 to keep none.")
        self.error_feedback = error_feedback
        self._shapes = [t.shape for t in like]
        self._devices = [t.device for t in like]
        groups: dict[tuple[int, int, torch.device], list[int]] = {}
        for index, tensor in enumerate(like):
            if tensor.ndim >= 2 and tensor.numel():
                n, m = _matrix_shape(tensor.shape)
                groups.setdefault((n, m, tensor.device), []).append(index)
        self._members = list(groups.values())
        generator = torch.Generator().manual_seed(seed)
        self._P: list[Tensor] = []
        self._Q: list[Tensor] = []
        self._E: list[Tensor] = []
        for (n, m, device), members in groups.items():
            g, r = len(members), min(rank, n, m)
            Q = torch.randn(g, m, r, generator=generator).to(device)
            self._Q.append(Q)
            # Zero until the first compression, so that it decompresses to zeros.
            self._P.append(torch.zeros(g, n, r, device=device))
            if error_feedback:
                self._E.append(torch.zeros(g, n, m, device=device))

    @staticmethod
    def measure_bytes(
        like: Sequence[Tensor], rank: int, *, error_feedback: bool = True
    ) -> int:
        """Bytes that an instance would hold, without building it."""
        total = 0
        for tensor in like:
            if tensor.ndim >= 2 and tensor.numel():
                n, m = _matrix_shape(tensor.shape)
                total += 4 * min(rank, n, m) * (n + m)
                total += 4 * n * m * error_feedback
        return total

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors P and Q."""
        return sum(t.nbytes for t in (*self._P, *self._Q))

    @property
    def nbytes(self) -> int:
        """Bytes held in all: factors and fed-back errors."""
        return self.factor_bytes + sum(t.nbytes for t in self._E)

    @torch.no_grad()
    def compress(self, residuals: Sequence[Tensor]) -> bool:
        """Take in one residual per tensor; they are read, not kept.

        Arithmetic is float32 whatever the dtype of the residuals.

        Returns:
            Whether they were taken in. Residuals with NaN or inf are not, and nothing
            changes.

        Raises:
            ConfigError: Other shapes than at construction; nothing was changed.
        """
        if [t.shape for t in residuals] != self._shapes:
            raise ConfigError(
                f"residuals of shapes {[tuple(t.shape) for t in residuals]}: must be "
                f"{[tuple(s) for s in self._shapes]}. Build anew for another model."
            )
        new_P, new_Q, new_E = [], [], []
        for k, members in enumerate(self._members):
            M = torch.stack([_matrix(residuals[i]) for i in members])
            if self.error_feedback:
                M = M + self._E[k]
            if not bool(M.isfinite().all()):
                return False
            # QR completes the basis where M Q has lost rank, so a direction that once
            # vanished from Q can come back.
            P = torch.linalg.qr(M @ self._Q[k]).Q
            Q = M.mT @ P
            if not bool(Q.isfinite().all()):
                return False
            new_P.append(P)
            new_Q.append(Q)
            if self.error_feedback:
                new_E.append(M - P @ Q.mT)
        self._P, self._Q, self._E = new_P, new_Q, new_E
        return True

    def decompress(self) -> list[Tensor]:
        """P Q' per tensor in its own shape, float32; zeros for skipped tensors."""
        result = [
            torch.zeros(shape, device=device)
            for shape, device in zip(self._shapes, self._devices, strict=True)
        ]
        for P, Q, members in zip(self._P, self._Q, self._members, strict=True):
            for index, matrix in zip(members, P @ Q.mT, strict=True):
                result[index] = matrix.reshape(self._shapes[index])
        return result

    def state_dict(self) -> dict[str, Any]:
        """Copies of the factors and errors per batch, in order of first appearance."""
        return {
            "P": [t.clone() for t in self._P],
            "Q": [t.clone() for t in self._Q],
            "E": [t.clone() for t in self._E],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change when a shape differs."""
        loaded = {
            name: _matching(state, name, held)
            for name, held in (("P", self._P), ("Q", self._Q), ("E", self._E))
        }
        self._P, self._Q, self._E = loaded["P"], loaded["Q"], loaded["E"]


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).reshape(_matrix_shape(tensor.shape))


def _matching(state: Any, name: str, held: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors under ``name``, on the devices of those held."""
    values = state.get(name) if isinstance(state, dict) else None
    if (
        not isinstance(values, list)
        or len(values) != len(held)
        or any(
            not isinstance(v, Tensor)
            or v.shape != h.shape
            or v.dtype != h.dtype
            or not bool(v.isfinite().all())
            for v, h in zip(values, held, strict=True)
        )
    ):
        raise CheckpointError(
            f"low-rank residual factors {name!r}: must be finite float32 tensors of "
            f"shapes {[tuple(h.shape) for h in held]}. "
            "Load with the model and rank that the checkpoint was saved with."
        )
    return [v.to(h.device).clone() for v, h in zip(values, held, strict=True)]
