"""The lag v = theta - ema(theta): in sleep, and as averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybridopt.protocols import Ops
from hybridopt.weights.buckets import Bucket

__all__ = ["DozingLag", "averaged"]

INTERVAL_STEPS = 8
"""Coasting steps between two updates of the lag."""
DEEP_INTERVAL_STEPS = 16
"""The same asleep, where nothing but ``evaluation_weights`` asks for it."""


class DozingLag:
    """Updates the EMA once in a few steps while nobody needs single displacements.

    In full precision the EMA E = theta - v itself is kept meanwhile, in the lag's
    place, and the window holds D - E. Then k steps at once are one pass over the
    weights,

        E <- E + k / (c + k) (theta - E),    c = beta / (1 - beta),

    which for k = 1 is the filter, and for any k leaves it the same lag v = c s behind a
    constant velocity s. ``wake`` brings back v, D and the anchor.

    An average of weights in less precision would stand still. There v goes on, and the
    anchor with it: k steps of displacements all alike make

        v <- beta^k v + (beta + ... + beta^k) / k (theta - anchor).
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.steps = 0
        """k, sleeping steps since the last update."""
        self.averages = False
        """Whether lags hold E, where that is precise enough."""
        self.windows = False
        """Whether the drift window goes on too: D += the EMA's displacement."""

    @property
    def due(self) -> bool:
        """Whether ``catch_up`` is."""
        interval = INTERVAL_STEPS if self.windows else DEEP_INTERVAL_STEPS
        return self.steps >= interval

    @property
    def dozes(self) -> bool:
        """Whether there is something to ``wake``."""
        return self.averages or self.steps > 0

    def reset(self) -> None:
        """Nothing is kept: lags and windows were cleared."""
        self.steps, self.averages = 0, False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to know besides the tensors."""
        return {
            "dozed": self.steps,
            "averages": self.averages,
            "coasted": self.windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.steps = int(state["dozed"])
        self.averages = bool(state.get("averages", False))
        self.windows = bool(state["coasted"])

    def catch_up(self, buckets: Sequence[Bucket], ops: Ops) -> None:
        """Take the steps since the last update in."""
        precise = [_is_precise(bucket) for bucket in buckets]
        for bucket, averages in zip(buckets, precise, strict=True):
            if not bucket.lags:
                continue
            if averages:
                if not self.averages:
                    self._begin(bucket)
                torch._foreach_lerp_(bucket.lags, bucket.parameters, self._pull())
            else:
                self._filter(bucket, ops)
        self.averages = self.averages or any(precise)
        self.steps = 0

    def wake(self, buckets: Sequence[Bucket], ops: Ops) -> None:
        """Lag, window and anchor as of now."""
        if self.steps:
            self.catch_up(buckets, ops)
        for bucket in buckets:
            if self.averages and _is_precise(bucket):
                if self.windows and bucket.windows:
                    torch._foreach_add_(bucket.windows, bucket.lags)
                _subtract_from(bucket.parameters, bucket.lags)
                ops.copy(bucket.parameters, bucket.anchors)
        self.averages = False

    def now(self, bucket: Bucket) -> list[Tensor]:
        """The lag as of now, in the parameters' precision; changes nothing."""
        weights, lags = bucket.parameters, bucket.lags
        if self.dozes and _is_precise(bucket):
            averages = lags
            if not self.averages:
                averages = list(torch._foreach_sub(bucket.anchors, lags))
            left = 1.0 - self._pull()
            return [(p - e) * left for p, e in zip(weights, averages, strict=True)]
        lags = [v.to(p.dtype) for v, p in zip(lags, weights, strict=True)]
        if self.steps == 0:
            return lags
        kept, taken = self._rates()
        ways = [
            p - a.to(p.device) for p, a in zip(weights, bucket.anchors, strict=True)
        ]
        return [v * kept + w * taken for v, w in zip(lags, ways, strict=True)]

    def _pull(self) -> float:
        return self.steps / (self.beta / (1.0 - self.beta) + self.steps)

    def _rates(self) -> tuple[float, float]:
        powers = [self.beta**k for k in range(1, self.steps + 1)]
        return powers[-1], sum(powers) / len(powers)

    def _begin(self, bucket: Bucket) -> None:
        """As of the anchor: v becomes E, D becomes D - E."""
        _subtract_from(bucket.anchors, bucket.lags)
        if self.windows and bucket.windows:
            torch._foreach_sub_(bucket.windows, bucket.lags)

    def _filter(self, bucket: Bucket, ops: Ops) -> None:
        """The buffers of s serve as scratch: a sleeping base step writes none."""
        kept, taken = self._rates()
        if self.windows and bucket.windows:
            # D += (v + s) - v', the first term before v is written.
            torch._foreach_add_(bucket.windows, bucket.lags)
        take = _take_on_host if bucket.on_host else _take_on_device
        take(bucket, ops, kept, taken)
        if self.windows and bucket.windows:
            torch._foreach_add_(bucket.windows, bucket.steps)
            torch._foreach_sub_(bucket.windows, bucket.lags)
        bucket.step_sq = None


def _is_precise(bucket: Bucket) -> bool:
    """Whether averages of these weights keep what a step changes of them."""
    return bool(bucket.lags) and all(
        v.dtype is p.dtype and v.dtype in (torch.float32, torch.float64)
        for v, p in zip(bucket.lags, bucket.parameters, strict=True)
    )


def _subtract_from(minuends: list[Tensor], tensors: list[Tensor]) -> None:
    """tensor_l <- minuend_l - tensor_l, in place."""
    for minuend, tensor in zip(minuends, tensors, strict=True):
        torch.sub(minuend, tensor, out=tensor)


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
