"""Batched power iteration: exact at full rank, honest about dependent columns."""

from __future__ import annotations

import torch

from hybridopt.kernels.lowrank import compress, orthonormalize, power_step


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def test_orthonormalize_gives_orthonormal_columns_of_the_same_span():
    matrix = random(3, 9, 4)
    basis = orthonormalize(matrix)
    eye = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    torch.testing.assert_close(basis.mT @ basis, eye, atol=1e-14, rtol=0)
    torch.testing.assert_close(basis @ (basis.mT @ matrix), matrix)


def test_orthonormalize_stays_orthogonal_for_nearly_equal_columns():
    column = random(1, 50, 1, dtype=torch.float32)
    noise = random(1, 50, 3, seed=1, dtype=torch.float32)
    basis = orthonormalize(column + 1e-3 * noise)
    eye = torch.eye(3).expand(1, 3, 3)
    torch.testing.assert_close(basis.mT @ basis, eye, atol=1e-5, rtol=0)


def test_orthonormalize_zeroes_a_dependent_column():
    column = random(2, 7, 1)
    basis = orthonormalize(torch.cat([column, 2 * column, 0 * column], dim=2))
    assert basis[:, :, 1:].abs().max() == 0
    torch.testing.assert_close(basis[:, :, 0].norm(dim=1), torch.ones(2).double())


def test_power_step_rebuilds_a_matrix_of_its_rank():
    matrix = random(2, 12, 3) @ random(2, 3, 8, seed=1)
    left, right = power_step(matrix, random(2, 8, 3, seed=2))
    torch.testing.assert_close(left @ right.mT, matrix)


def test_power_step_converges_to_the_best_approximation():
    matrix = random(1, 10, 6)
    warm = random(1, 6, 2, seed=1)
    for _ in range(200):
        left, warm = power_step(matrix, warm)
    u, s, v = torch.linalg.svd(matrix)
    best = u[:, :, :2] * s[:, None, :2] @ v[:, :2]
    torch.testing.assert_close(left @ warm.mT, best)


def test_compress_keeps_the_order_of_mixed_shapes():
    shapes = [(4, 6), (5, 3), (4, 6), (2, 2)]
    matrices = [random(*s, seed=i) for i, s in enumerate(shapes)]
    warm = [random(s[1], 2, seed=9 + i) for i, s in enumerate(shapes)]
    left, right = compress(matrices, warm)
    for i, m in enumerate(matrices):
        one_left, one_right = power_step(m[None], warm[i][None])
        torch.testing.assert_close(left[i], one_left[0])
        torch.testing.assert_close(right[i], one_right[0])
