"""Counts what a run spends, and watches the clock only while training runs."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["FORWARD_COST", "Meter", "live_tensor_bytes"]

FORWARD_COST = 1.0 / 3.0
"""Cost of a forward in real steps; a backward costs the other two thirds."""


class Meter:
    """Wraps a task's closure: every call is a forward, every gradient that reaches the
    loss is a backward, and a backward draws the next batch.

    So the i-th real step of every arm sees the i-th batch, whatever happens between;
    forward-only calls see the batch of the next real step and do not use it up.
    """

    def __init__(
        self, closure: Callable[[], Tensor], advance: Callable[[], None] | None = None
    ) -> None:
        self._closure, self._advance = closure, advance
        self.forwards = 0
        self.backwards = 0
        self.wall_s = 0.0
        self.process_s = 0.0

    @property
    def validations(self) -> int:
        """Forwards without a backward."""
        return self.forwards - self.backwards

    @property
    def cost(self) -> float:
        """Work so far in real steps."""
        return self.forwards * FORWARD_COST + self.backwards * (1.0 - FORWARD_COST)

    def forward(self) -> Tensor:
        """Forward closure: the loss with its graph; gradients are the caller's."""
        self.forwards += 1
        loss = self._closure()
        if loss.requires_grad:
            loss.register_hook(self._on_backward)
        return loss

    def _on_backward(self, _: Tensor) -> None:
        self.backwards += 1
        if self._advance is not None:
            self._advance()

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Let both clocks run for the block; queued device work is waited for."""
        _synchronize(device)
        wall, process = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            _synchronize(device)
            self.wall_s += time.perf_counter() - wall
            self.process_s += time.process_time() - process


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def live_tensor_bytes() -> int:
    """Bytes of all tensor storages that Python objects hold, each counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for held in gc.get_objects():
        # type() instead of isinstance: some lazy proxies run code on isinstance.
        if issubclass(type(held), Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                storage = held.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
