"""The device's own answer to whether numbers are finite."""

import math

import torch

from hybridopt.kernels.finite import find_non_finite
from tests.problems import assert_same_bits


def test_finite_numbers_come_back_bit_for_bit_and_bad_ones_are_found():
    g = torch.Generator().manual_seed(0)
    special = torch.tensor([-0.0, 1e-42, 3e38, -3e38])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = [torch.randn(s, generator=g).to(dtype) for s in ((7, 5), (), (65,))]
        tensors.append(special.clamp(-6e4, 6e4).to(dtype))
        before = [t.clone() for t in tensors]
        assert find_non_finite(tensors, torch.device("cpu")) == 0.0
        assert_same_bits(before, tensors)
        assert bool(tensors[-1][0].signbit())
        for bad in (math.nan, math.inf, -math.inf):
            tensors[2][-1] = bad
            assert find_non_finite(tensors, torch.device("cpu")) == 1.0


def test_nothing_is_finite():
    assert find_non_finite([], torch.device("cpu")) == 0.0
