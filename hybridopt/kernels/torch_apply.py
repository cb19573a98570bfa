"""``TorchOps.apply``: three ways to move the weights or to leave all of them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.kernels.flat import dot, groups, segment_sums, wide

__all__ = ["apply_on_device", "apply_on_host", "apply_packed"]


def apply_packed(
    parameters: Sequence[Tensor], packed: Tensor, factors: Tensor
) -> Tensor:
    """``apply`` over one matrix whose row 0 is theta and whose others are the basis."""
    sizes = [t.numel() for t in parameters]
    theta, directions = packed[0], packed[1:]
    spread = factors.t().repeat_interleave(
        torch.tensor(sizes), dim=1, output_size=theta.numel()
    )
    terms = directions * spread
    if not math.isfinite(terms.sum().item()):
        # Rare: 0 * inf is NaN, but an unused direction counts as zero.
        terms = torch.where(spread == 0, 0.0, terms)
    delta = terms.sum(0)
    new = theta + delta
    moved = [
        m.view(p.shape)
        for m, p in zip(new.split_with_sizes(sizes), parameters, strict=True)
    ]
    squares = segment_sums(delta.square().unsqueeze(0), parameters).flatten()
    if all(p.dtype == new.dtype for p in parameters):
        return _commit(parameters, moved, squares, [new])
    moved = [m.to(p.dtype) for m, p in zip(moved, parameters, strict=True)]
    return _commit(parameters, moved, squares, moved)


def apply_on_host(
    parameters: Sequence[Tensor], basis: Sequence[Sequence[Tensor]], factors: Tensor
) -> Tensor:
    """``apply`` tensor by tensor on the CPU; in place where norms prove it safe."""
    rows = factors.tolist()
    proved = _apply_in_place(parameters, basis, rows)
    if proved is not None:
        return proved
    moved, squares = [], []
    for index, (theta, row) in enumerate(zip(parameters, rows, strict=True)):
        delta = _delta(theta, [b[index] for b in basis], row)
        flat = delta.reshape(-1)
        squares.append(dot(flat, flat).float())
        moved.append(delta.add_(theta).to(theta.dtype))
    return _commit(parameters, moved, torch.stack(squares), moved)


_SAFE = 1e37
"""Magnitude below which float32 sums of two numbers cannot overflow."""


def _apply_in_place(
    parameters: Sequence[Tensor],
    basis: Sequence[Sequence[Tensor]],
    rows: Sequence[Sequence[float]],
) -> Tensor | None:
    """The move without a copy of the weights, or None where that takes a closer look.

    No element exceeds its tensor's norm, so when ||theta|| + |k| ||b|| is far below the
    largest float, every new weight is finite and nothing has to be computed twice.
    Fresh buffers for new weights would cost more than the arithmetic: on a CPU each
    page of them is faulted in anew.
    """
    chosen: list[tuple[Tensor, Tensor, float]] = []
    norms: list[Tensor] = []
    for index, (theta, row) in enumerate(zip(parameters, rows, strict=True)):
        used = [(b[index], k) for b, k in zip(basis, row, strict=True) if k != 0]
        if len(used) > 1 or theta.dtype not in (torch.float32, torch.float64):
            return None
        flat = theta.reshape(-1)
        norms.append(dot(flat, flat))
        direction, k = used[0] if used else (theta, 0.0)
        if direction.dtype != theta.dtype:
            return None
        along = direction.reshape(-1)
        norms.append(dot(along, along) if used else flat.new_zeros(()))
        chosen.append((theta, direction, k))
    found = torch.stack(norms).double().view(-1, 2)
    factor = torch.tensor([k for _, _, k in chosen], dtype=torch.float64)
    squares = factor.square() * found[:, 1]
    reach = found[:, 0].sqrt() + squares.sqrt()
    if not bool((reach < _SAFE).all()):  # NaN and inf end here as well
        return None
    for theta, direction, k in chosen:
        if k != 0:
            theta.add_(direction, alpha=k)
    return torch.cat([squares.float(), torch.ones(1)])


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
