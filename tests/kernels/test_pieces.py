"""Directions of low precision on the CPU: piece by piece, as if taken whole."""

from __future__ import annotations

import pytest
import torch

from hybridopt.kernels import flat
from hybridopt.kernels.torch_ops import TorchOps

SHAPES = ((), (0,), (1,), (50,), (7, 11), (2, 3, 5))


def _lists(transposed=False):
    generator = torch.Generator().manual_seed(0)
    made = []
    for dtype in (torch.float32, torch.float32, torch.float32, *[torch.bfloat16] * 2):
        tensors = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
        if transposed:
            tensors = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
        made.append(tensors)
    return made


def _run(transposed):
    ops, (theta, g, anchor, step, lag) = TorchOps(), _lists(transposed)
    seen = ops.observe(g, [step, lag])
    sums = ops.advance(theta, g, anchor, step, lag, 0.9)
    factors = torch.linspace(-1, 1, len(SHAPES)).unsqueeze(1)
    moved = ops.apply(theta, [step], factors, 0.5)
    return [*theta, *anchor, *step, *lag], [seen, sums, moved]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_give_what_whole_tensors_give(piece, transposed, monkeypatch):
    whole, figures = _run(transposed)
    monkeypatch.setattr(flat, "_PIECE", piece)
    tensors, same = _run(transposed)
    for a, b in zip(tensors, whole, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(same, figures, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_direction_of_low_precision_moves_nothing(bad, monkeypatch):
    monkeypatch.setattr(flat, "_PIECE", 7)
    theta, _, _, step, _ = _lists()
    step[4][3, 2] = bad
    before = [t.clone() for t in theta]
    flag = TorchOps().apply(theta, [step], torch.ones(len(SHAPES), 1), 1.0)[-1]
    assert float(flag) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))


def test_sums_of_low_precision_are_taken_in_float32():
    many = torch.full((300_000,), 1.0, dtype=torch.bfloat16)
    assert float(flat.dot(many, many)) == 300_000.0
