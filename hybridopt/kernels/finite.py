"""Whether all numbers are finite, asked and answered on their device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["find_non_finite"]


def find_non_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """0-dim float32 on ``device``: 1.0 if some element is NaN or inf, else 0.0.

    What ``GradScaler`` unscales with, by a factor of one: a launch or two for all
    tensors of one format, and they keep every bit.

    Args:
        tensors: Floating point, on ``device``; written, so no element may be another's.
        device: Where the answer is wanted, by who skips a step on the strength of it.
    """
    flag = torch.zeros((), device=device)
    # One launch reads all its tensors in the first one's format, unasked.
    for kind in {t.dtype for t in tensors}:
        alike = [t for t in tensors if t.dtype is kind]
        torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, _one(device))
    return flag


@lru_cache(maxsize=8)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
