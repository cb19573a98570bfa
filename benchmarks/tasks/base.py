"""What every benchmark task is made of, and how its batches are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "BatchTask",
    "EpochOrder",
    "Scale",
    "Setting",
    "TaskUnavailableError",
    "batch_generator",
]

Scale = Literal["quick", "full", "gpu"]
Batch = TypeVar("Batch")


class TaskUnavailableError(RuntimeError):
    """A task's data or package is not here; the message says how to get it."""


@dataclass(frozen=True)
class Setting:
    """Where and how large a task is built."""

    seed: int = 0
    """Sets initial weights and the order of batches."""
    scale: Scale = "quick"
    device: str = "cpu"
    data: Path | None = None
    """Folder with data sets that no package brings."""


class BatchTask(Generic[Batch]):
    """A task whose i-th real step uses the i-th batch, for every arm alike.

    Args:
        model: What is trained; only its trainable parameters are.
        loss: Training loss of one batch.
        batch: The i-th batch; a pure function of its index.
        evaluate: Held-out error, lower is better; draws nothing.
        on_step: Told the scheduled step and their total before each step.
        objective_batches: Batches that the training objective is measured on.
    """

    full_batch = False
    OBJECTIVE_START = 1 << 31
    """Index of the first batch of the training objective; no run gets this far. Not
    beyond 32 bits: torch's CPU generator uses no more of a seed, so such an index would
    draw the run's own first batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch], Tensor],
        batch: Callable[[int], Batch],
        evaluate: Callable[[], float],
        on_step: Callable[[int, int], None] | None = None,
        *,
        objective_batches: int = 16,
    ) -> None:
        self.model, self.loss, self.batch = model, loss, batch
        self._objective_batches = objective_batches
        self.evaluate = evaluate
        self.index = 0
        self._on_step = on_step

    def closure(self) -> Tensor:
        """Loss on the current batch, with its graph."""
        return self.loss(self.batch(self.index))

    def advance(self) -> None:
        """Go to the next batch; called after each backward."""
        self.index += 1

    @torch.no_grad()
    def objective(self) -> float:
        """Training loss in eval mode, mean over batches that are the same for all arms
        of a seed, drawn from the training data like any others.
        """
        training = self.model.training
        self.model.eval()
        indices = range(self._objective_batches)
        losses = [self.loss(self.batch(self.OBJECTIVE_START + i)) for i in indices]
        self.model.train(training)
        return float(torch.stack(losses).mean())

    def begin_step(self, step: int, total_steps: int) -> None:
        """Tell the task where in its schedule the run is."""
        if self._on_step is not None:
            self._on_step(step, total_steps)


def batch_generator(seed: int, index: int) -> torch.Generator:
    """A generator for one batch, so that batch i needs no batch before it."""
    # Mersenne twister states of nearby seeds are close for the first draws; the large
    # odd factors spread them.
    mixed = (seed + 1) * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9
    return torch.Generator().manual_seed(mixed % (1 << 63))


class EpochOrder:
    """Rows of the i-th batch when every epoch is a fresh permutation."""

    def __init__(self, size: int, batch: int, seed: int) -> None:
        if not 0 < batch <= size:
            raise ValueError(
                f"batch={batch}: must be in 1..{size}, the data set's size."
            )
        self.per_epoch, self.batch = size // batch, batch

        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            return torch.randperm(size, generator=batch_generator(seed, epoch))

        self._order = order

    def __call__(self, index: int) -> Tensor:
        """(batch,) row numbers."""
        epoch, position = divmod(index, self.per_epoch)
        start = position * self.batch
        return self._order(epoch)[start : start + self.batch]
