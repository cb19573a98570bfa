"""The lag v = theta - ema(theta): in sleep, and as averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hybridopt.protocols import Ops
from hybridopt.weights.buckets import Bucket

__all__ = ["DozingLag", "averaged"]

INTERVAL_STEPS = 8
"""Sleeping steps between two updates of the lag."""


class DozingLag:
    """Updates the lag once in a few steps while nobody needs single displacements.

    The anchor stays where the last update left it. For k steps since then

        v <- beta^k v + (beta + ... + beta^k) / k (theta - anchor),

    which is k times v <- beta (v + s) with the displacements s all alike: the average
    is that of a straight way between two points that are the very weights.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.steps = 0
        """k, sleeping steps since the anchor was set."""
        self.windows = False
        """Whether the drift window goes on too: D += the EMA's displacement, which is
        that of theta less the change of the lag."""

    @property
    def due(self) -> bool:
        """Whether ``catch_up`` is."""
        return self.steps >= INTERVAL_STEPS

    def _rates(self) -> tuple[float, float]:
        powers = [self.beta**k for k in range(1, self.steps + 1)]
        return powers[-1], sum(powers) / len(powers)

    def catch_up(self, buckets: Sequence[Bucket], ops: Ops) -> None:
        """Take the steps since the anchor into the lag, and set the anchor.

        The buffers of s serve as scratch: a sleeping base step writes none.
        """
        kept, taken = self._rates()
        for bucket in buckets:
            if bucket.lags:
                if self.windows:
                    # D += (v + s) - v', the first term before v is written.
                    torch._foreach_add_(bucket.windows, bucket.lags)
                take = _take_on_host if bucket.on_host else _take_on_device
                take(bucket, ops, kept, taken)
                if self.windows:
                    torch._foreach_add_(bucket.windows, bucket.steps)
                    torch._foreach_sub_(bucket.windows, bucket.lags)
                bucket.step_sq = None
        self.steps = 0

    def now(self, bucket: Bucket) -> list[Tensor]:
        """The lag as of now, in the parameters' precision; changes nothing."""
        pairs = zip(bucket.lags, bucket.parameters, strict=True)
        lags = [v.to(p.dtype) for v, p in pairs]
        if self.steps == 0:
            return lags
        kept, taken = self._rates()
        ways = [
            p - a.to(p.device)
            for p, a in zip(bucket.parameters, bucket.anchors, strict=True)
        ]
        return [v * kept + w * taken for v, w in zip(lags, ways, strict=True)]


def _take_on_host(bucket: Bucket, ops: Ops, kept: float, taken: float) -> None:
    """S <- theta - anchor, v <- kept v + taken s, anchor <- theta."""
    lists = (bucket.parameters, bucket.anchors, bucket.steps)
    for theta, anchor, way in zip(*lists, strict=True):
        torch.sub(theta, anchor, out=way)
    for way, lag in zip(bucket.steps, bucket.lags, strict=True):
        lag.mul_(kept).add_(way, alpha=taken)
    ops.copy(bucket.parameters, bucket.anchors)


def _take_on_device(bucket: Bucket, ops: Ops, kept: float, taken: float) -> None:
    """The same in a few launches: ``Ops.advance`` does it with one factor for both, so
    v gets the ratio first. Its sums are not needed, nor whose they are.
    """
    torch._foreach_mul_(bucket.lags, kept / taken)
    thetas = bucket.parameters
    ops.advance(thetas, thetas, bucket.anchors, bucket.steps, bucket.lags, taken)


@contextmanager
def averaged(
    buckets: Sequence[Bucket], lag: DozingLag, ops: Ops, share: float
) -> Iterator[None]:
    """Weights <- theta - share v inside; the very bits back on exit."""
    kept = [[p.clone() for p in b.parameters] for b in buckets]
    with torch.no_grad():
        for bucket in buckets:
            torch._foreach_sub_(bucket.parameters, lag.now(bucket), alpha=share)
    try:
        yield
    finally:
        with torch.no_grad():
            for bucket, old in zip(buckets, kept, strict=True):
                ops.copy(old, bucket.parameters)
