"""The device's own answer to whether numbers are finite."""

import math

import pytest
import torch

from hybridopt.kernels.finite import find_non_finite
from tests.problems import assert_same_bits

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def test_finite_numbers_come_back_bit_for_bit_and_bad_ones_are_found():
    g = torch.Generator().manual_seed(0)
    special = torch.tensor([-0.0, 1e-42, 3e38, -3e38])
    for dtype in (F32, BF16, F16, F64):
        tensors = [torch.randn(s, generator=g).to(dtype) for s in ((7, 5), (), (65,))]
        tensors.append(special.clamp(-6e4, 6e4).to(dtype))
        before = [t.clone() for t in tensors]
        assert find_non_finite(tensors, torch.device("cpu")) == 0.0
        assert_same_bits(before, tensors)
        assert bool(tensors[-1][0].signbit())
        for bad in (math.nan, math.inf, -math.inf):
            tensors[2][-1] = bad
            assert find_non_finite(tensors, torch.device("cpu")) == 1.0


def test_formats_are_never_mixed_in_one_launch(monkeypatch):
    launched = []
    check = torch._amp_foreach_non_finite_check_and_unscale_

    def watched(tensors, flag, scale):
        launched.append({t.dtype for t in tensors})
        check(tensors, flag, scale)

    name = "_amp_foreach_non_finite_check_and_unscale_"
    monkeypatch.setattr(torch, name, watched)
    kinds = (F32, BF16, F16, BF16)
    for bad in (None, 0, 1, 2, 3):
        tensors = [torch.ones(3, dtype=kind) for kind in kinds]
        if bad is not None:
            tensors[bad][1] = math.nan
        found = find_non_finite(tensors, torch.device("cpu"))
        assert found == float(bad is not None)
    assert all(len(kinds) == 1 for kinds in launched)
    # No card's kernel reads bfloat16.
    assert {kind for kinds in launched for kind in kinds} == {F32, F16}


@pytest.mark.parametrize("kind", [F32, BF16])
def test_nothing_is_finite(kind):
    host = torch.device("cpu")
    assert find_non_finite([], host) == 0.0
    empty = torch.empty(0, 3, dtype=kind)
    assert find_non_finite([empty], host) == 0.0
    assert find_non_finite([empty, torch.full((2,), math.nan, dtype=kind)], host) == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [F32, BF16, F16, F64])
def test_a_card_answers_as_the_host_does(kind):
    device = torch.device("cuda", 0)
    tensors = [torch.randn(s, device=device).to(kind) for s in ((70001,), (3, 5), ())]
    tensors.append(torch.ones((), device=device))
    before = [t.clone() for t in tensors]
    assert find_non_finite(tensors, device).item() == 0.0
    assert_same_bits(before, tensors)
    for bad in (math.nan, math.inf):
        tensors[0][-1] = bad
        assert find_non_finite(tensors, device).item() == 1.0
