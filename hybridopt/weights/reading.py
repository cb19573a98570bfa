"""Statistics on their way from the device to the host: one transfer, one wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        self._host: list[Tensor] | None = None
        self._events: list[torch.cuda.Event] = []

    def add_statistics(self, rows: list[int], values: Tensor) -> None:
        """Take in one bucket's (rows, 1 + 2 j) statistics, on its device."""
        self._blocks.append((rows, values))

    def add_slopes(self, rows: list[int], values: Tensor) -> None:
        """Take in (rows,) inner products <g, s> of the step before, on their device."""
        self._slopes.append((rows, values))

    def non_finite(self, device: torch.device) -> Tensor:
        """0-dim float32 on ``device``: 1.0 when a gradient or the loss is not finite.

        What fused optimizers take as ``found_inf``: they skip on the device.
        """
        total = torch.zeros((), device=device)
        for _, values in self._blocks:
            total = total + values[:, 0].sum().to(device, torch.float32)
        if isinstance(self._loss, Tensor):
            total = total + self._loss.to(device, torch.float32).reshape(())
        # NaN and inf survive the sum and turn into NaN here; finite numbers into 0.
        return (total - total).ne(0.0).to(torch.float32)

    def send(self) -> None:
        """Start the transfers; device work queued from here on does not delay them."""
        self._host = []
        for tensor in self._parts():
            if tensor.device.type == "cpu":
                self._host.append(tensor)
                continue
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            target.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(tensor.device))
            self._events.append(event)
            self._host.append(target)

    def wait(self) -> Reading:
        """The numbers, once they have arrived."""
        if self._host is None:
            self.send()
        for event in self._events:
            # Asking costs less than waiting, even for what has long been there.
            if not event.query():  # type: ignore[no-untyped-call]
                event.synchronize()
        host = [t.double() for t in self._host or []]
        statistics = torch.zeros(self._size, 1 + 2 * BASIS_SIZE, dtype=torch.float64)
        slopes = torch.zeros(self._size, dtype=torch.float64)
        cursor = 0
        if self._fused():
            flat, offset = host[0], 0
            for rows, values in self._blocks:
                block = flat[offset : offset + values.numel()].view(len(rows), -1)
                _scatter(statistics, rows, block)
                offset += values.numel()
            for rows, values in self._slopes:
                slopes[rows] = -flat[offset : offset + values.numel()]
                offset += values.numel()
            loss = float(flat[-1]) if isinstance(self._loss, Tensor) else self._plain()
            return Reading(statistics, loss, slopes)
        for rows, values in self._blocks:
            _scatter(statistics, rows, host[cursor].view(values.shape))
            cursor += 1
        for rows, _ in self._slopes:
            slopes[rows] = -host[cursor]
            cursor += 1
        loss = float(host[cursor]) if isinstance(self._loss, Tensor) else self._plain()
        return Reading(statistics, loss, slopes)

    def _plain(self) -> float:
        return float("nan") if self._loss is None else float(self._loss)

    def _tensors(self) -> list[Tensor]:
        parts = [values for _, values in self._blocks]
        parts += [values for _, values in self._slopes]
        if isinstance(self._loss, Tensor):
            parts.append(self._loss)
        return parts

    def _fused(self) -> bool:
        """Whether everything is on one GPU and travels as one tensor."""
        parts = self._tensors()
        return bool(parts) and all(
            t.device == parts[0].device and t.device.type == "cuda" for t in parts
        )

    def _parts(self) -> list[Tensor]:
        parts = self._tensors()
        if not self._fused():
            return parts
        wide = max((t.dtype for t in parts), key=lambda d: d.itemsize)
        return [torch.cat([t.reshape(-1).to(wide) for t in parts])]


def _scatter(statistics: Tensor, rows: list[int], block: Tensor) -> None:
    """Write a bucket's rows; a reading with fewer directions leaves zeros."""
    directions = (block.shape[1] - 1) // 2
    if directions == BASIS_SIZE and len(rows) == len(statistics):
        statistics.copy_(block)
        return
    columns = [0, *range(1, 1 + directions)]
    columns += [1 + BASIS_SIZE + j for j in range(directions)]
    statistics[torch.tensor(rows).unsqueeze(1), torch.tensor(columns)] = block
