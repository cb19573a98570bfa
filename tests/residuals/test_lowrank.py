from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridopt.errors import CheckpointError, ConfigError
from hybridopt.residuals import LowRankResidual


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(n: int, m: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as 1, 1/2, 1/4, ..."""
    g = generator(seed)
    size = min(n, m)
    U = torch.linalg.qr(torch.randn(n, size, generator=g)).Q
    V = torch.linalg.qr(torch.randn(m, size, generator=g)).Q
    return U * 0.5 ** torch.arange(size) @ V.T


def best_error(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].square().sum().sqrt())


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3])
def test_lowrank_approaches_the_best_rank_r_error(
    shape: tuple[int, int], rank: int
) -> None:
    matrix = decaying(*shape)
    factors = LowRankResidual([matrix], rank, error_feedback=False)
    errors = []
    for _ in range(6):
        assert factors.compress([matrix])
        (rebuilt,) = factors.decompress()
        errors.append(float((matrix - rebuilt).norm()))
    best = best_error(matrix, rank)
    assert errors[0] > 1.001 * best
    assert errors[-1] <= 1.001 * best
    assert errors[-1] >= best * (1 - 1e-5)
    assert torch.linalg.matrix_rank(rebuilt, rtol=1e-5) <= rank


def test_lowrank_is_exact_on_a_matrix_of_that_rank() -> None:
    g = generator(1)
    matrix = torch.randn(8, 2, generator=g) @ torch.randn(2, 30, generator=g)
    factors = LowRankResidual([matrix], 2)
    factors.compress([matrix])
    torch.testing.assert_close(factors.decompress()[0], matrix, rtol=1e-4, atol=1e-5)


def test_lowrank_rank_above_the_matrix_loses_nothing() -> None:
    matrix = decaying(3, 40)
    factors = LowRankResidual([matrix], 16)
    factors.compress([matrix])
    torch.testing.assert_close(factors.decompress()[0], matrix, rtol=1e-4, atol=1e-6)


def test_lowrank_error_feedback_makes_the_sums_track() -> None:
    g, matrix = generator(2), decaying(16, 10)
    factors = LowRankResidual([matrix], 2)
    plain = LowRankResidual([matrix], 2, error_feedback=False)
    true, sent, lossy = (torch.zeros(16, 10) for _ in range(3))
    gaps = []
    for _ in range(60):
        residual = matrix + 0.1 * torch.randn(16, 10, generator=g)
        true += residual
        factors.compress([residual])
        plain.compress([residual])
        sent += factors.decompress()[0]
        lossy += plain.decompress()[0]
        gaps.append(float((true - sent).norm()))
    # What is missing from the sum is exactly the error still to be fed back.
    (error,) = factors.state_dict()["E"]
    torch.testing.assert_close(true - sent, error[0], rtol=1e-3, atol=1e-4)
    assert gaps[-1] < 2 * max(gaps[10:30])
    assert gaps[-1] < 0.25 * float((true - lossy).norm())


def test_lowrank_without_feedback_keeps_no_error() -> None:
    factors = LowRankResidual([torch.zeros(6, 5)], 2, error_feedback=False)
    assert factors.state_dict()["E"] == []
    assert factors.nbytes == factors.factor_bytes == 4 * 2 * (6 + 5)


SHAPES = st.lists(
    st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.booleans())
def test_lowrank_handles_any_shapes_within_its_memory_bound(
    shapes: list[tuple[int, ...]], rank: int, feedback: bool
) -> None:
    g = generator(3)
    residuals = [torch.randn(s, generator=g) for s in shapes]
    factors = LowRankResidual(residuals, rank, error_feedback=feedback)
    for _ in range(2):
        assert factors.compress(residuals)
    rebuilt = factors.decompress()
    assert [t.shape for t in rebuilt] == [t.shape for t in residuals]
    bound = 0
    for tensor, back in zip(residuals, rebuilt, strict=True):
        if tensor.ndim < 2:
            assert not back.any()
        elif tensor.numel():
            bound += 4 * rank * (tensor.shape[0] + tensor[0].numel())
            assert float((tensor - back).norm()) < 3 * float(tensor.norm())
    assert factors.factor_bytes <= bound
    assert factors.nbytes == LowRankResidual.measure_bytes(
        residuals, rank, error_feedback=feedback
    )


def test_lowrank_batches_do_not_mix_tensors() -> None:
    matrices = [decaying(8, 6, seed) for seed in range(4)]
    others = [matrices[0], decaying(5, 7), matrices[1], torch.ones(3), *matrices[2:]]
    together = LowRankResidual(others, 6)
    together.compress(others)
    for tensor, back in zip(others, together.decompress(), strict=True):
        if tensor.ndim == 2:
            torch.testing.assert_close(back, tensor, rtol=1e-4, atol=1e-5)


def test_lowrank_views_convolutions_as_matrices() -> None:
    kernel = torch.einsum("a,bcd->abcd", torch.arange(1.0, 5.0), torch.ones(3, 2, 2))
    factors = LowRankResidual([kernel], 1)
    factors.compress([kernel])
    torch.testing.assert_close(factors.decompress()[0], kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_lowrank_keeps_float32_factors_for_any_dtype(dtype: torch.dtype) -> None:
    matrix = decaying(10, 8)
    factors = LowRankResidual([matrix.to(dtype)], 8)
    factors.compress([matrix.to(dtype)])
    (rebuilt,) = factors.decompress()
    assert rebuilt.dtype is torch.float32
    assert factors.factor_bytes == 4 * 8 * 18
    torch.testing.assert_close(rebuilt, matrix.to(dtype).float(), rtol=1e-3, atol=1e-5)


def test_lowrank_recovers_after_a_residual_of_zero() -> None:
    matrix = decaying(10, 8)
    factors = LowRankResidual([matrix], 2, error_feedback=False)
    factors.compress([torch.zeros(10, 8)])
    assert not factors.decompress()[0].any()
    for _ in range(8):
        factors.compress([matrix])
    error = float((matrix - factors.decompress()[0]).norm())
    assert error <= 1.01 * best_error(matrix, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_lowrank_leaves_out_residuals_that_are_not_finite(bad: float) -> None:
    matrices = [decaying(6, 5), decaying(4, 4)]
    factors = LowRankResidual(matrices, 2)
    factors.compress(matrices)
    before = factors.decompress()
    broken = [matrices[0], matrices[1].clone()]
    broken[1][2, 2] = bad
    assert factors.compress(broken) is False
    assert all(map(torch.equal, factors.decompress(), before))


def test_lowrank_reads_its_input_only() -> None:
    matrix = decaying(6, 5)
    copy_of_it = matrix.clone()
    factors = LowRankResidual([matrix], 2)
    factors.compress([matrix])
    factors.decompress()[0].zero_()
    assert torch.equal(matrix, copy_of_it)
    assert factors.decompress()[0].any()


def test_lowrank_state_continues_bit_for_bit() -> None:
    g = generator(4)
    like = [torch.zeros(7, 5), torch.zeros(3), torch.zeros(7, 5), torch.zeros(4, 9)]
    one, other = LowRankResidual(like, 2, seed=1), LowRankResidual(like, 2, seed=2)
    stream = [[torch.randn(t.shape, generator=g) for t in like] for _ in range(8)]
    for residuals in stream[:4]:
        one.compress(residuals)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for residuals in stream[4:]:
        one.compress(residuals)
        other.compress(residuals)
        assert all(map(torch.equal, one.decompress(), other.decompress()))


def test_lowrank_refuses_state_of_another_shape_and_keeps_its_own() -> None:
    factors = LowRankResidual([decaying(6, 5)], 2)
    factors.compress([decaying(6, 5)])
    before = factors.decompress()[0]
    good = factors.state_dict()
    other = LowRankResidual([decaying(6, 4)], 2).state_dict()
    nan = {**good, "Q": [torch.full_like(good["Q"][0], float("nan"))]}
    for broken in (other, {}, None, {**good, "E": []}, nan):
        with pytest.raises(CheckpointError):
            factors.load_state_dict(broken)  # type: ignore[arg-type]
    assert torch.equal(factors.decompress()[0], before)


def test_lowrank_refuses_rank_zero_and_other_shapes() -> None:
    with pytest.raises(ConfigError, match="rank=0"):
        LowRankResidual([torch.zeros(2, 2)], 0)
    factors = LowRankResidual([torch.zeros(2, 2)], 1)
    with pytest.raises(ConfigError, match=r"\(3, 2\)"):
        factors.compress([torch.zeros(3, 2)])
