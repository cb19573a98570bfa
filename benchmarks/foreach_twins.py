"""The kernels' work written with ``torch._foreach_*`` as well as we can.

Rivals for ``benchmarks.kernels``. Each takes its ``Operands`` (duck-typed here, so that
this module stays free of the benchmark) and does what the kernel of that name does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def observe(o: Any) -> Tensor:
    """Norms by ``_foreach_norm``; inner products by one product list and sums."""
    lists = (o.gradient, o.step, o.lag)
    norms = [torch._foreach_norm(ts, 2, torch.float32) for ts in lists]
    columns = [torch.stack(n).square() for n in norms]
    for direction in (o.step, o.lag):
        products = torch._foreach_mul(o.gradient, direction)
        columns.append(torch.stack([p.sum(dtype=torch.float32) for p in products]))
    return torch.stack(columns, 1)


def advance(o: Any) -> Tensor:
    """In place, temporaries for one list of float32 differences."""
    work = torch._foreach_sub(o.theta, o.anchor)
    torch._foreach_copy_(o.step, work)
    dots = torch._foreach_mul(work, o.gradient)
    torch._foreach_add_(work, [v.to(w.dtype) for v, w in zip(o.lag, work, strict=True)])
    torch._foreach_mul_(work, 0.97)
    torch._foreach_copy_(o.lag, work)
    torch._foreach_copy_(o.anchor, o.theta)
    columns = [torch.stack([d.sum(dtype=torch.float32) for d in dots])]
    for ts in (o.step, o.lag):
        columns.append(torch.stack(torch._foreach_norm(ts, 2, torch.float32)).square())
    return torch.stack(columns, 1)


def _delta(o: Any) -> list[Tensor]:
    first, second = (o.coefficients * 1e-3).t().tolist()
    delta = torch._foreach_mul([s.to(torch.float32) for s in o.step], first)
    other = torch._foreach_mul([v.to(torch.float32) for v in o.lag], second)
    torch._foreach_add_(delta, other)
    return list(delta)


def apply(o: Any) -> Tensor:
    """Coefficients and the finite flag go through the host, as foreach demands."""
    delta = _delta(o)
    squares = torch.stack(torch._foreach_norm(delta)).square()
    torch._foreach_add_(delta, o.theta)
    largest = torch.stack(torch._foreach_norm(delta, float("inf")))
    if largest.isfinite().all():
        torch._foreach_copy_(o.theta, delta)
    return squares


def copy(o: Any) -> None:
    """One ``_foreach_copy_``."""
    torch._foreach_copy_(o.anchor, o.theta)


def lead(o: Any) -> None:
    """Displacements widened, so that every foreach call takes its fast path."""
    moved = torch._foreach_sub(o.anchor, o.theta)
    torch._foreach_copy_(o.step, moved)
    for direction, factor in ((o.step, -1e-3), (o.lag, 1e-3)):
        torch._foreach_copy_(moved, direction)
        torch._foreach_add_(o.theta, moved, alpha=factor)


def adamw_and_apply(o: Any) -> None:
    """The fused AdamW of torch, then the move by foreach from the displacement."""
    steps = [torch.tensor(10.0, device=t.device) for t in o.theta[:1]] * len(o.theta)
    before = [t.clone() for t in o.theta]
    torch._fused_adamw_(
        o.theta,
        o.gradient,
        o.first,
        o.second,
        [],
        steps,
        lr=1e-4,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    gain, factor = (o.coefficients * 1e-3).t().tolist()
    moved = torch._foreach_sub(o.theta, before)
    torch._foreach_mul_(moved, gain)
    torch._foreach_add_(o.theta, moved)
    torch._foreach_add_(o.theta, torch._foreach_mul(o.lag, factor))


TWINS: dict[str, dict[str, Any]] = {
    "observe": {"foreach": observe},
    "advance": {"foreach": advance},
    "apply": {"foreach": apply},
    "copy": {"foreach": copy},
    "lead": {"foreach": lead},
    "adamw+move": {"fused AdamW + foreach move": adamw_and_apply},
}
