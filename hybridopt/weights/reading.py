"""Statistics on their way from the device to the host: one transfer, one wait."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridopt.kernels.finite import find_non_finite
from hybridopt.types import BASIS_SIZE

__all__ = ["PendingReading", "Reading"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over gradients and basis measured, still on this rank.

    Rows of tensors that had no gradient are zero.
    """

    statistics: Tensor
    """(L, 1 + 2 J) float64 CPU: ||g||^2, <g, b_j>, ||b_j||^2 per tensor."""
    loss: float
    """Local loss; nan when there was none."""
    slopes: Tensor
    """(L,) float64 CPU: -<g, s> of the base step before this one."""
    skips: int = 0
    """Steps before this one that the base skipped unseen."""


class PendingReading:
    """Collects device results, sends them off, and waits only when asked.

    On a GPU the copy goes to pinned memory behind an event, so that work queued after
    it (the base's step) runs while the host waits for the numbers.

    Args:
        size: L.
        loss: Local loss of the closure, where it returned one.
    """

    def __init__(self, size: int, loss: Tensor | float | None) -> None:
        self._size = size
        # It may wait for a whole step, and must not keep the graph alive as long.
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._blocks: list[tuple[list[int], Tensor]] = []
        self._slopes: list[tuple[list[int], Tensor]] = []
        self._skips: Tensor | None = None
        self._host: list[Tensor] | None = None
        self._fused = False
        self._first = 0
        self._events: list[torch.cuda.Event] = []

    def add_statistics(self, rows: list[int], values: Tensor, first: int = 0) -> None:
        """Take in one bucket's (rows, 1 + 2 j) statistics, on its device.

        Args:
            rows: Of its tensors.
            values: ||g||^2, <g, b> and ||b||^2 of the directions from ``first`` on.
            first: Column of the first direction; the ones before it are zero.
        """
        self._blocks.append((rows, values))
        self._first = first

    def add_slopes(self, rows: list[int], values: Tensor) -> None:
        """Take in (rows,) inner products <g, s> of the step before, on their device."""
        self._slopes.append((rows, values))

    def non_finite(self, device: torch.device) -> Tensor:
        """0-dim float32 on ``device``: 1.0 when a gradient or the loss is not finite.

        What fused optimizers take as ``found_inf``: they skip on the device.
        """
        parts = [values[:, 0].to(device) for _, values in self._blocks]
        loss = self._loss
        if isinstance(loss, Tensor):
            # A copy: the answer comes by a pass that writes what it reads.
            parts.append(loss.to(device, torch.float32, copy=True))
        elif loss is not None and not math.isfinite(loss):
            parts.append(torch.full((), math.nan, device=device))
        return find_non_finite(parts, device)

    def send(self, skips: Tensor | None = None) -> None:
        """Start the transfers; device work queued from here on does not delay them.

        Args:
            skips: 0-dim, what ``Reading.skips`` is to be.
        """
        self._skips = skips
        parts = [values for _, values in self._blocks]
        parts += [values for _, values in self._slopes]
        if isinstance(self._loss, Tensor):
            parts.append(self._loss.detach())
        if skips is not None:
            parts.append(skips)
        if all(t.device.type == "cpu" for t in parts):
            self._host = parts
            return
        # What is on one GPU travels as one tensor.
        self._fused = all(t.device == parts[0].device for t in parts)
        if self._fused:
            wide = max((t.dtype for t in parts), key=lambda d: d.itemsize)
            parts = [torch.cat([t.reshape(-1).to(wide) for t in parts])]
        self._host = [self._start(tensor) for tensor in parts]

    def _start(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        target.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(tensor.device))
        self._events.append(event)
        return target

    def wait(self) -> Reading:
        """The numbers, once they have arrived."""
        if self._host is None:
            self.send()
        for event in self._events:
            # Asking costs less than waiting, even for what has long been there.
            if not event.query():  # type: ignore[no-untyped-call]
                event.synchronize()
        host = self._split() if self._fused else list(self._host or [])
        skips = 0 if self._skips is None else int(host.pop())
        # Never look at the loss itself: on a GPU that waits for all that is queued.
        on_way = isinstance(self._loss, Tensor)
        loss = float(host.pop()) if on_way else self._plain()
        count = len(self._blocks)
        shape = (self._size, 1 + 2 * BASIS_SIZE)
        blocks = [(r, h) for (r, _), h in zip(self._blocks, host[:count], strict=True)]
        slopes = [(r, h) for (r, _), h in zip(self._slopes, host[count:], strict=True)]
        if len(blocks) == 1 and blocks[0][1].shape == shape:
            statistics = blocks[0][1].double()
        else:
            statistics = torch.zeros(shape, dtype=torch.float64)
            for rows, block in blocks:
                _scatter(statistics, rows, block.double(), self._first)
        if len(slopes) == 1 and len(slopes[0][0]) == self._size:
            return Reading(statistics, loss, slopes[0][1].double().neg(), skips)
        falls = torch.zeros(self._size, dtype=torch.float64)
        for rows, values in slopes:
            falls[rows] = -values.double()
        return Reading(statistics, loss, falls, skips)

    def _split(self) -> list[Tensor]:
        """The parts of what travelled as one tensor."""
        assert self._host is not None
        values = [values for _, values in (*self._blocks, *self._slopes)]
        sizes = [v.numel() for v in values]
        sizes += [1] * (isinstance(self._loss, Tensor) + (self._skips is not None))
        pieces = self._host[0].split_with_sizes(sizes)
        shaped = [p.view(v.shape) for p, v in zip(pieces, values, strict=False)]
        return [*shaped, *pieces[len(values) :]]

    def _plain(self) -> float:
        return float("nan") if self._loss is None else float(self._loss)


def _scatter(
    statistics: Tensor, rows: list[int], block: Tensor, first: int = 0
) -> None:
    """Write a bucket's rows; a reading with fewer directions leaves zeros."""
    directions = (block.shape[1] - 1) // 2
    places: slice | list[int] = rows
    if len(rows) == len(statistics):
        places = slice(None)
    statistics[places, 0] = block[:, 0]
    if directions:
        dots, squares = 1 + first, 1 + BASIS_SIZE + first
        statistics[places, dots : dots + directions] = block[:, 1 : 1 + directions]
        statistics[places, squares : squares + directions] = block[:, 1 + directions :]
