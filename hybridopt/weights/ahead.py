"""Putting weights ahead of the base's trajectory, and measuring whether it pays.

Each bucket keeps the base's last two displacements, with their sign turned, in two
lists that swap roles from step to step: ``side`` tells which holds the newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridopt.kernels.flat import dot
from hybridopt.protocols import Ops
from hybridopt.weights.buckets import Bucket
from hybridopt.weights.reading import PendingReading

__all__ = [
    "Part",
    "leads",
    "measure",
    "measure_on_host",
    "put_ahead",
    "remember",
    "sample",
]

LARGE = 1 << 14
"""Weights of a tensor of which a share of the rows is enough to look at."""
SHARES = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a bucket's tensors; views."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    leads: tuple[list[Tensor], list[Tensor]]


def sample(buckets: Sequence[Bucket], turn: int) -> list[Part]:
    """An eighth of the rows of every large tensor, another eighth at every turn.

    Gradients in row blocks are as good a sample of a cosine between vectors of a
    million weights, and a pass over them costs an eighth.
    """
    return [_sampled(bucket, turn) for bucket in buckets]


def _sampled(bucket: Bucket, turn: int) -> Part:
    spans = [_span(p, turn) for p in bucket.parameters]

    def rows(tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        pairs = zip(tensors, spans, strict=True)
        return [t if span is None else t[span] for t, span in pairs]

    one, other = bucket.leads
    return Part(
        rows(bucket.parameters), rows(bucket.gradients), (rows(one), rows(other))
    )


def _span(tensor: Tensor, turn: int) -> slice | None:
    if tensor.numel() < LARGE or tensor.shape[0] < SHARES:
        return None
    turn, rows = turn % SHARES, tensor.shape[0]
    return slice(rows * turn // SHARES, rows * (turn + 1) // SHARES)


def leads(buckets: Sequence[Bucket]) -> bool:
    """Whether every one of them has room for two displacements."""
    return bool(buckets) and all(b.leads[0] and b.leads[1] for b in buckets)


def measure(ops: Ops, buckets: Sequence[Bucket], side: int) -> PendingReading:
    """Gradients against the last two displacements, on their way to the host.

    ``wait`` brings (n, 5), in the order of all parameters: ||g||^2, -<g, s>, -<g, p>,
    ||s||^2, ||p||^2.
    """
    last = max(row for bucket in buckets for row in bucket.rows)
    reading = PendingReading(last + 1, None)
    for bucket in buckets:
        if bucket.gradients:
            basis = [bucket.leads[side], bucket.leads[1 - side]]
            reading.add_statistics(bucket.rows, ops.observe(bucket.gradients, basis))
    reading.send()
    return reading


FEW_WEIGHTS = 1 << 20
"""Up to which all tensors together are one vector: a call costs more than its sums."""


def measure_on_host(buckets: Sequence[Bucket | Part], side: int) -> Tensor:
    """(1, 4) of all CPU buckets together: ||g||^2, -<g, s>, -<g, p>, ||s||^2."""
    sums = [0.0] * 4
    for bucket in buckets:
        if not bucket.gradients:
            continue
        lists = (bucket.gradients, bucket.leads[side], bucket.leads[1 - side])
        count = sum([g.numel() for g in bucket.gradients])
        if count <= FEW_WEIGHTS:
            rows = [[torch.cat([t.reshape(-1) for t in part])] for part in lists]
        else:
            rows = [[t.reshape(-1) for t in part] for part in lists]
        for g, s, p in zip(*rows, strict=True):
            for place, (a, b) in enumerate(((g, g), (g, s), (g, p), (s, s))):
                sums[place] += dot(a, b).item()
    return torch.tensor([sums], dtype=torch.float64)


def remember(buckets: Sequence[Bucket | Part], side: int) -> list[list[Tensor]]:
    """The weights that the base is about to move, per bucket.

    Where precisions agree they take the older displacement's place. (The anchor will
    not do: somebody else may have written weights since it was set, and what is ahead
    by multiplies.)
    """
    kept = []
    for bucket in buckets:
        older = bucket.leads[1 - side]
        if older[0].dtype is bucket.parameters[0].dtype:
            torch._foreach_copy_(older, bucket.parameters)
            kept.append(older)
        else:
            # A copy bit by bit in one launch.
            kept.append(list(torch._foreach_mul(bucket.parameters, 1.0)))
    return kept


def put_ahead(
    ops: Ops,
    buckets: Sequence[Bucket | Part],
    before: Sequence[list[Tensor]],
    side: int,
    lead: float,
    made: float,
    skip: Tensor | None = None,
) -> None:
    """Theta += lead s - made p, with s the base's step just made and p the one before.

    What is taken back is, to the last bit, the number that was added; and the older of
    the two displacements is s afterwards.

    Args:
        ops: Does it in one pass if it can.
        buckets: All of them tracked.
        before: What ``remember`` returned before that step.
        side: Of p.
        lead: kappa from now on.
        made: kappa by which the weights are ahead so far.
        skip: 0-dim, 1.0 where the base left everything as it was: then nothing moves,
            and where ``lead`` is positive, s is what the weights are ahead by over
            ``lead``.
    """
    kernel = getattr(ops, "put_ahead", None)
    for bucket, weights in zip(buckets, before, strict=True):
        newest, older = bucket.leads[1 - side], bucket.leads[side]
        lists = (bucket.parameters, weights, older, newest)
        if kernel is not None and kernel(*lists, lead, made, skip):
            continue
        torch._foreach_sub_(weights, bucket.parameters)
        if weights is not newest:
            torch._foreach_copy_(newest, weights)
        if lead > 0.0:
            torch._foreach_add_(bucket.parameters, newest, alpha=-lead)
        if made <= 0.0:
            continue
        if skip is None:
            torch._foreach_add_(bucket.parameters, older, alpha=made)
            continue
        stays = skip.to(older[0].device, older[0].dtype)
        back = torch._foreach_mul(older, 1.0 - stays)
        torch._foreach_add_(bucket.parameters, back, alpha=made)
        if lead > 0.0:
            left = torch._foreach_mul(older, stays)
            torch._foreach_add_(newest, left, alpha=made / lead)
