"""How the base's step is taken in, and how snapshots travel between devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.protocols import Ops
from hybridopt.weights.buckets import Bucket

__all__ = [
    "advance",
    "advance_low",
    "advance_moved",
    "clear",
    "copy_across",
    "restart",
    "turn",
]


def advance(ops: Ops, bucket: Bucket, beta: float) -> Tensor:
    """S <- theta - anchor, v <- beta (v + s), anchor <- theta; (rows,) <g, s>."""
    sums = ops.advance(
        bucket.parameters,
        bucket.gradients,
        bucket.anchors,
        bucket.steps,
        bucket.lags,
        beta,
    )
    _add_to_window(bucket, beta)
    return _kept(bucket, sums)


def advance_low(ops: Ops, bucket: Bucket) -> Tensor:
    """The same without lag and anchor, where s holds the weights before the step."""
    torch._foreach_neg_(bucket.steps)
    torch._foreach_add_(bucket.steps, bucket.parameters)
    return _kept(bucket, ops.observe(bucket.gradients, [bucket.steps])[:, 1:])


def advance_moved(
    ops: Ops, buckets: Sequence[Bucket], beta: float, gains: Tensor
) -> Tensor | None:
    """``advance`` of a single bucket with the move theta += gains s in the same pass.

    Returns:
        (rows,) <g, s>; None where there is no kernel for it, and then nothing was
        written.
    """
    kernel = getattr(ops, "advance_move", None)
    if kernel is None or len(buckets) != 1 or not buckets[0].gradients:
        return None
    bucket = buckets[0]
    chosen = gains if len(bucket.rows) == len(gains) else gains[bucket.rows]
    sums: Tensor | None = kernel(
        bucket.parameters,
        bucket.gradients,
        bucket.anchors,
        bucket.steps,
        bucket.lags,
        beta,
        chosen.to(torch.float32),
    )
    if sums is None:
        return None
    _add_to_window(bucket, beta)
    return sums[:, 0]


def _kept(bucket: Bucket, sums: Tensor) -> Tensor:
    """(rows,) <g, s> of (rows, 2) sums; ||s||^2 stays with the bucket on the CPU."""
    if bucket.on_host:
        bucket.step_sq = sums[:, 1]
        # A finite s proves finite weights: theta = anchor + s, element by element, and
        # what is not finite stays so in a difference.
        bucket.vouch(math.isfinite(sums[:, 1].sum().item()))
    return sums[:, 0]


def _add_to_window(bucket: Bucket, beta: float) -> None:
    if bucket.windows:
        # The EMA's own step is (1 - beta) / beta of the new lag.
        torch._foreach_add_(bucket.windows, bucket.lags, alpha=(1.0 - beta) / beta)


def clear(buckets: Sequence[Bucket], *, drifts: bool = False) -> None:
    """S, v, D <- 0, and d if ``drifts``: no displacement is known, nothing filtered."""
    for bucket in buckets:
        kept = [bucket.drifts] if drifts else []
        for part in (bucket.steps, bucket.lags, bucket.windows, *kept):
            if part:
                torch._foreach_zero_(part)
        bucket.step_sq = None
        if drifts:
            bucket.drift_sq = None


def turn(buckets: Sequence[Bucket]) -> None:
    """The window's displacement becomes the drift direction: d <- D, D <- 0."""
    for bucket in buckets:
        if bucket.windows:
            torch._foreach_copy_(bucket.drifts, bucket.windows)
            bucket.drift_sq = None
    restart(buckets)


def restart(buckets: Sequence[Bucket]) -> None:
    """D <- 0: a window begins."""
    for bucket in buckets:
        if bucket.windows:
            torch._foreach_zero_(bucket.windows)


def copy_across(
    ops: Ops, source: list[Tensor], target: list[Tensor]
) -> torch.cuda.Event | None:
    """Target <- source, between device and pinned memory too, without waiting.

    Returns:
        For a copy between devices, what marks its end on the device's stream.
    """
    devices = {t.device for t in (*source, *target)}
    if len(devices) < 2:
        ops.copy(source, target)
        return None
    for a, b in zip(source, target, strict=True):
        b.copy_(a, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    device = next(d for d in devices if d.type == "cuda")
    event.record(torch.cuda.current_stream(device))
    return event
