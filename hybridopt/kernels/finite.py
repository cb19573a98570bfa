"""Whether all numbers are finite, asked and answered on their device."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["find_non_finite"]


_UNSCALED = frozenset({torch.float16, torch.float32, torch.float64})
"""Formats that ``GradScaler``'s own kernel reads on every device; not bfloat16, which
nobody scales.
"""


def find_non_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """0-dim float32 on ``device``: 1.0 if some element is NaN or inf, else 0.0.

    What ``GradScaler`` unscales with, by a factor of one: a launch or two for all
    tensors of one format, and they keep every bit. Other formats by the largest element
    of each tensor.

    Args:
        tensors: Floating point, on ``device``; written, so no element may be another's.
        device: Where the answer is wanted, by who skips a step on the strength of it.
    """
    flag = torch.zeros((), device=device)
    # One launch reads all its tensors in the first one's format, unasked.
    for kind in {t.dtype for t in tensors}:
        alike = [t for t in tensors if t.dtype is kind]
        if kind in _UNSCALED:
            torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, _one(device))
        else:
            flag = torch.maximum(flag, _largest_is_not(alike, flag))
    return flag


def _largest_is_not(tensors: list[Tensor], like: Tensor) -> Tensor:
    """1.0 if the largest element of some tensor is not finite, as ``like`` is."""
    filled = [t for t in tensors if t.numel()]  # an empty one has no largest element
    if not filled:
        return torch.zeros_like(like)
    largest = torch.stack(torch._foreach_norm(filled, math.inf))
    return largest.isfinite().all().logical_not().to(like.dtype)


@lru_cache(maxsize=8)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
