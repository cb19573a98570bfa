"""``TorchOps.apply``: ways to move the weights or to leave all of them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.kernels.flat import dot, flat, groups, pieces, wide

__all__ = ["apply_on_device", "apply_on_host"]


Row = Sequence[float]


def apply_on_host(
    parameters: Sequence[Tensor],
    basis: Sequence[Sequence[Tensor]],
    rows: Sequence[Row],
    squares: Sequence[Tensor | None] = (),
    finite: bool = False,
) -> Tensor:
    """``apply`` tensor by tensor on the CPU; in place where norms prove it safe.

    Args:
        rows: L rows of J factors on the directions.
        squares: (L,) squared norms per direction, where known.
        finite: Whether every weight is known to be finite.
    """
    proved = _apply_in_place(parameters, basis, rows, squares, finite)
    if proved is not None:
        return proved
    moved, lengths = [], []
    for index, (theta, row) in enumerate(zip(parameters, rows, strict=True)):
        delta = _delta(theta, [b[index] for b in basis], row)
        vector = delta.reshape(-1)
        lengths.append(dot(vector, vector).float())
        moved.append(delta.add_(theta).to(theta.dtype))
    return _commit(parameters, moved, torch.stack(lengths), moved)


_SAFE = 1e37
"""Magnitude below which float32 sums of a few numbers cannot overflow."""
_ABSORBED = 1e30
"""Magnitude below which no sum with a finite float32 overflows: less than half a unit
in the last place of the largest float (1.0e31) is rounded away there."""


def _apply_in_place(
    parameters: Sequence[Tensor],
    basis: Sequence[Sequence[Tensor]],
    rows: Sequence[Row],
    squares: Sequence[Tensor | None],
    finite: bool,
) -> Tensor | None:
    """The move without a copy of the weights, or None where that takes a closer look.

    No element exceeds its tensor's norm. So when ||theta|| + sum |k_j| ||b_j|| is far
    below the largest float, every new weight is finite and nothing has to be computed
    twice; where theta is known to be finite, bounded |k_j| ||b_j|| prove it alone.
    Fresh buffers for new weights would cost more than the arithmetic: on a CPU each
    page of them is faulted in anew.
    """
    if not _in_full_precision(parameters, basis):
        return None
    reaches = [0.0] * len(rows)
    known = [*squares, *(None,) * (len(basis) - len(squares))]
    for j, (direction, square) in enumerate(zip(basis, known, strict=True)):
        factors = [abs(row[j]) for row in rows]
        if not all([k < _SAFE for k in factors]):
            return None
        if any(factors):
            terms = zip(reaches, factors, _norms(direction, square), strict=True)
            # 0 * inf is NaN, but an unused direction counts as zero.
            reaches = [r + k * n if k != 0.0 else r for r, k, n in terms]
    # NaN and inf fail these comparisons as well.
    if not all([reach < _ABSORBED for reach in reaches]):
        return None
    if not finite and not all([n < _SAFE for n in _norms(parameters, None)]):
        return None
    lengths = [reach * reach for reach in reaches]
    for index, (theta, row) in enumerate(zip(parameters, rows, strict=True)):
        used = [j for j, k in enumerate(row) if k != 0.0]
        if len(used) == 1:
            j = used[0]
            _add(theta, basis[j][index], row[j])
        elif used:
            delta = _delta(theta, [b[index] for b in basis], row)
            vector = flat(delta, theta.dtype)
            lengths[index] = dot(vector, vector).item()
            theta.add_(delta)
    return torch.tensor([*lengths, 1.0])


def _add(theta: Tensor, direction: Tensor, factor: float) -> None:
    if direction.dtype is theta.dtype:
        theta.add_(direction, alpha=factor)
        return
    for weights, along in pieces(theta, direction):
        weights.add_(along, alpha=factor)


def _in_full_precision(
    parameters: Sequence[Tensor], basis: Sequence[Sequence[Tensor]]
) -> bool:
    """Whether sums in the weights' own precision are exact enough: all weights are
    float32, or everything is float64.
    """
    kind = parameters[0].dtype
    if kind is torch.float32:
        return all([t.dtype is kind for t in parameters]) and not any(
            [t.dtype is torch.float64 for tensors in basis for t in tensors]
        )
    return kind is torch.float64 and all(
        [t.dtype is kind for tensors in (parameters, *basis) for t in tensors]
    )


def _norms(tensors: Sequence[Tensor], squares: Tensor | None) -> list[float]:
    """Norm of every tensor, from its square where that is known."""
    if squares is None:
        vectors = [flat(t, t.dtype) for t in tensors]
        squares = torch.stack([dot(v, v) for v in vectors])
    return [math.sqrt(n) for n in squares.tolist()]


def _delta(theta: Tensor, directions: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    """sum_j row_j b_j in the arithmetic precision of ``theta``; a new tensor."""
    precision = wide(theta)
    used = [(b, k) for b, k in zip(directions, row, strict=True) if k != 0]
    if not used:
        return torch.zeros_like(theta, dtype=precision)
    delta = torch.mul(used[0][0].to(precision), used[0][1])
    for b, k in used[1:]:
        delta.add_(b.to(precision), alpha=k)
    return delta


def _commit(
    parameters: Sequence[Tensor],
    moved: Sequence[Tensor],
    squares: Tensor,
    judged: Sequence[Tensor],
) -> Tensor:
    """Write ``moved`` if ``judged`` is finite; CPU only, so the host may look."""
    if all(_finite(m) for m in judged):
        torch._foreach_copy_(list(parameters), list(moved))
        return torch.cat([squares.float(), torch.ones(1)])
    return torch.cat([squares.float(), torch.zeros(1)])


def _finite(tensor: Tensor) -> bool:
    """Whether every element is finite; one cheap sum settles it almost always.

    A sum with a NaN or inf in it is never finite, so a finite sum proves the claim.
    """
    if math.isfinite(tensor.sum(dtype=wide(tensor)).item()):
        return True
    return bool(torch.isfinite(tensor).all())


def apply_on_device(
    parameters: Sequence[Tensor], basis: Sequence[Sequence[Tensor]], factors: Tensor
) -> Tensor:
    """``apply`` without a host decision: the flag stays on the device.

    The first pass finds the flag and forgets the new weights, the second computes them
    again, group by group: twice the reads, but no copy of the weights.
    """
    squares: list[Tensor] = []
    flags: list[Tensor] = []
    for part in groups(parameters):
        deltas, moved = _moved(parameters, basis, factors, part)
        squares += [dot(d.reshape(-1), d.reshape(-1)).float() for d in deltas]
        filled = [m for m in moved if m.numel()]
        if filled:
            # The largest magnitude is NaN or inf exactly if some element is.
            norms = torch._foreach_norm(filled, math.inf)
            flags.append(torch.isfinite(torch.stack([n.float() for n in norms])).all())
    good = torch.stack(flags).all() if flags else torch.ones_like(squares[0]).bool()
    for part in groups(parameters):
        _, moved = _moved(parameters, basis, factors, part)
        old = list(parameters[part])
        kept = [torch.where(good, m, p) for m, p in zip(moved, old, strict=True)]
        torch._foreach_copy_(old, kept)
    return torch.stack([*squares, good.to(torch.float32)])


def _moved(
    parameters: Sequence[Tensor],
    basis: Sequence[Sequence[Tensor]],
    factors: Tensor,
    part: slice,
) -> tuple[list[Tensor], list[Tensor]]:
    """Deltas and new weights of one group of tensors, all new tensors."""
    on_host = factors.device.type == "cpu"
    rows = factors[part]
    lists = zip(*(b[part] for b in basis), strict=True) if basis else None
    deltas, moved = [], []
    for index, theta in enumerate(parameters[part]):
        directions = next(lists) if lists is not None else ()
        if on_host:
            delta = _delta(theta, directions, rows[index].tolist())
        else:
            delta = torch.zeros_like(theta, dtype=wide(theta))
            for b, k in zip(directions, rows[index].unbind(), strict=True):
                delta.add_(torch.where(k == 0, 0.0, b.to(delta.dtype) * k))
        deltas.append(delta)
        moved.append((delta + theta).to(theta.dtype))
    return deltas, moved
