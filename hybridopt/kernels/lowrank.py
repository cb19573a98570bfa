"""Low-rank factors of many matrices at once: the tall-skinny products of PowerSGD.

One step of warm-started power iteration per call: P = M Q, orthonormalize P, Q = M^T P,
so that M is close to P Q^T. Matrices of like shape and dtype go through one batched
product (cuBLAS through torch). Source: Vogels et al. 2019, arXiv 1905.13727.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compress", "orthonormalize", "power_step"]


@torch.no_grad()
def orthonormalize(matrix: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Orthonormal columns that span those of (B, m, r) matrices, batched.

    Gram-Schmidt, each column projected twice, since once loses orthogonality to
    rounding when columns are close. A column that is linearly dependent on those
    before it, to ``epsilon`` of its length, becomes zero instead of noise. float32 or
    float64, returned in that precision.

    Cost: r batched products; r is small, where a batched QR launches far more.
    """
    working = matrix.clone()
    for column in range(matrix.shape[2]):
        vector = working[:, :, column : column + 1]
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        before = working[:, :, :column]
        for _ in range(2):
            vector = vector - before @ (before.mT @ vector)
        left = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        kept = left > epsilon * length
        unit = vector / torch.where(kept, left, torch.ones_like(left))
        working[:, :, column : column + 1] = torch.where(kept, unit, 0.0)
    return working


@torch.no_grad()
def power_step(matrices: Tensor, warm: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration for (B, m, n) matrices from (B, n, r) right factors.

    Returns:
        P (B, m, r) with orthonormal columns and Q (B, n, r) = M^T P; M is close to
        P Q^T, exactly M if its rank is at most r and ``warm`` is in general position.
    """
    working = matrices.to(warm.dtype)
    left = orthonormalize(torch.bmm(working, warm))
    return left, torch.bmm(working.mT, left)


@torch.no_grad()
def compress(
    matrices: Sequence[Tensor], warm: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``power_step`` for matrices of any shapes, like shapes batched.

    Args:
        matrices: Two-dimensional, (m_l, n_l).
        warm: Right factors of the last call, (n_l, r_l), float32 or float64.

    Returns:
        Left and right factors in the order of ``matrices``.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (m, q) in enumerate(zip(matrices, warm, strict=True)):
        key = (m.shape, q.shape, m.dtype, q.dtype, m.device)
        alike.setdefault(key, []).append(index)
    left: list[Tensor] = [warm[i] for i in range(len(warm))]
    right = list(left)
    for members in alike.values():
        batch = torch.stack([matrices[i] for i in members])
        factors = power_step(batch, torch.stack([warm[i] for i in members]))
        for place, index in enumerate(members):
            left[index], right[index] = factors[0][place], factors[1][place]
    return left, right
