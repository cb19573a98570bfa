"""The noise-filtered weights, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from hybridopt.protocols import Ops
from hybridopt.weights.buckets import Bucket

__all__ = ["averaged"]


@contextmanager
def averaged(ops: Ops, buckets: Sequence[Bucket]) -> Iterator[None]:
    """Weights <- theta - v (their EMA) inside; the very bits back on exit."""
    kept = [[p.clone() for p in b.parameters] for b in buckets]
    with torch.no_grad():
        for b in buckets:
            lags = [v.to(p.dtype) for v, p in zip(b.lags, b.parameters, strict=True)]
            torch._foreach_sub_(b.parameters, lags)
    try:
        yield
    finally:
        with torch.no_grad():
            for b, old in zip(buckets, kept, strict=True):
                ops.copy(old, b.parameters)
