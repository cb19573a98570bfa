"""One training run of the demo, bare or wrapped, measured the same way.

Both kinds of run share the loop, the closure and every counter; they differ in who
calls backward. Forward and backward passes are counted where they happen (in the
closure, and by a hook on the loss), not taken from the optimizer's own statistics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hybridopt.demo.model import ByteGPT
from hybridopt.demo.presets import Preset, rate_factor
from hybridopt.demo.text import Corpus
from hybridopt.optimizer import HybridPredictOptimizer
from hybridopt.telemetry.comparison import (
    BACKWARD_COST,
    FORWARD_COST,
    Arm,
    Evaluation,
    GainHistory,
)
from hybridopt.telemetry.live import RunProgress
from hybridopt.types import STEP, StepRecord

__all__ = ["RunPlan", "Task", "TrainingRun", "Weights"]

Weights = dict[str, Tensor]
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.1
_GAIN_SAMPLES = 80


@dataclass(frozen=True, slots=True)
class Task:
    """What every compared run shares."""

    preset: Preset
    corpus: Corpus
    seed: int
    """Seed of the batches."""
    device: torch.device
    learning_rate: float
    warmup_share: float
    """Share of the schedule spent in linear warm-up."""

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, context) of the ``index``-th gradient."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return self._draw(self.corpus.train, generator)

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """The fixed held-out set, the same for every seed."""
        generator = torch.Generator().manual_seed(20_250_101)
        count = self.preset.validation_batches
        return [self._draw(self.corpus.validation, generator) for _ in range(count)]

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on CUDA, plain float32 elsewhere."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _draw(self, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = self.preset.model.context + 1
        size = (self.preset.batch_size, 1)
        starts = torch.randint(len(text) - length + 1, size, generator=generator)
        window = text[starts + torch.arange(length)].to(self.device).long()
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What sets one run apart from the others of its task."""

    name: str
    """Short name for tables."""
    description: str
    """What runs, in words."""
    steps: int
    """Scheduled steps."""
    hybrid: bool = False
    """Whether AdamW is wrapped, with hybridopt's defaults."""
    metrics_path: Path | None = None
    """Where the wrapped optimizer writes one line per step."""


class TrainingRun:
    """One run in progress; ``advance`` it, then ``finish`` it.

    Args:
        plan: What sets this run apart.
        task: Data, model size and rate.
        weights: Initial weights, copied.
    """

    def __init__(self, plan: RunPlan, task: Task, weights: Weights) -> None:
        self.plan = plan
        self.steps = steps = plan.steps
        self.task = task
        self.model = ByteGPT(task.preset.model).to(task.device)
        self.model.load_state_dict(weights)
        base = torch.optim.AdamW(
            self.model.parameters(),
            lr=task.learning_rate,
            betas=_BETAS,
            weight_decay=_WEIGHT_DECAY,
        )
        self.hybrid: HybridPredictOptimizer | None = None
        if plan.hybrid:
            path = None if plan.metrics_path is None else str(plan.metrics_path)
            self.hybrid = HybridPredictOptimizer(
                base, model=self.model, metrics_path=path
            )
        self.optimizer: torch.optim.Optimizer = self.hybrid or base
        warmup = round(task.warmup_share * steps)
        self.scheduler = LambdaLR(
            self.optimizer, lambda step: rate_factor(step, steps, warmup)
        )
        self._validation = task.validation()
        self._step = self._forwards = self._backwards = 0
        self._wall_s = 0.0
        self._evaluations: list[Evaluation] = []
        self._training: list[tuple[int, float, float, Tensor | float]] = []
        self._records: list[StepRecord] = []
        self._gain_steps: list[int] = []
        self._gains: list[tuple[float, ...]] = []

    # -- one step -------------------------------------------------------------------

    def _loss(self) -> Tensor:
        """The closure: batch i belongs to the i-th backward, however many steps pass.

        A forward-only validation sees the batch of the next gradient.
        """
        inputs, targets = self.task.batch(self._backwards)
        self._forwards += 1
        with self.task.autocast():
            loss = self.model.loss(inputs, targets)
        if loss.requires_grad:
            loss.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return loss

    def _count_backward(self, gradient: Tensor) -> None:
        self._backwards += 1

    def _bare_step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _take_step(self) -> Tensor | float | None:
        """One scheduled step; its measured loss, or None when nothing was measured."""
        if self.hybrid is None:
            return self._bare_step()
        before = self._backwards
        self.hybrid.step(self._loss)
        record = self.hybrid.last_step
        assert record is not None
        self._records.append(record)
        return record.loss if self._backwards > before else None

    # -- many steps -----------------------------------------------------------------

    def advance(
        self, steps: int, progress: RunProgress, refresh: Callable[[RunProgress], None]
    ) -> None:
        """Make scheduled steps; the clock runs during training only.

        Args:
            steps: How many; fewer where the schedule ends.
            progress: Kept up to date.
            refresh: Called with it behind every step, off the clock.
        """
        on_host = self.task.device.type == "cpu"
        for _ in range(min(steps, self.steps - self._step)):
            started = time.perf_counter()
            loss = self._take_step()
            self.scheduler.step()
            self._wall_s += time.perf_counter() - started
            self._step += 1
            if loss is not None:
                cost = self.cost
                self._training.append((self._step, cost, self._wall_s, loss))
            record = self._records[-1] if self._records else None
            # Reading a CUDA loss here would make the bare run wait for the device at
            # every step, which it need not do.
            known = loss is not None and (on_host or isinstance(loss, float))
            progress.take(float(loss) if known and loss is not None else None, record)
            progress.active_s = self._wall_s
            self._sample_gains()
            refresh(progress)
        started = time.perf_counter()
        if not on_host:
            torch.cuda.synchronize(self.task.device)
        self._wall_s += time.perf_counter() - started
        if self._training and progress.steps:
            progress.loss = float(self._training[-1][3])

    @property
    def cost(self) -> float:
        """Spent so far, in real steps."""
        return FORWARD_COST * self._forwards + BACKWARD_COST * self._backwards

    @property
    def done(self) -> bool:
        """Whether the schedule has ended."""
        return self._step >= self.steps

    @torch.no_grad()
    def evaluate(self) -> float:
        """Measure the held-out loss, hybridopt's at its evaluation weights; costs no
        budget.
        """
        self.model.eval()
        losses = []
        judged = self.hybrid.evaluation_weights() if self.hybrid else nullcontext()
        with judged:
            for inputs, targets in self._validation:
                with self.task.autocast():
                    losses.append(self.model.loss(inputs, targets))
        self.model.train()
        loss = float(torch.stack(losses).mean())
        self._evaluations.append(Evaluation(self._step, self.cost, self._wall_s, loss))
        return loss

    def _sample_gains(self) -> None:
        """Read the per-tensor gains of the move in force, now and then."""
        if self.hybrid is None:
            return
        last = self._gain_steps[-1] if self._gain_steps else -self.steps
        move = self.hybrid.run.controller.move
        if move is None or self._step - last < self.steps / _GAIN_SAMPLES:
            return
        self._gain_steps.append(self._step)
        self._gains.append(tuple(move.coefficients[:, STEP].tolist()))

    # -- the end --------------------------------------------------------------------

    def weights(self) -> Weights:
        """A copy of the weights, on the CPU."""
        state = self.model.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def finish(self) -> Arm:
        """Close the optimizer and hand over everything that was measured."""
        statistics: dict[str, Any] = {}
        # The hybrid tensors live in the same state, so this counts them too.
        state_bytes = tensor_bytes(self.optimizer.state.values())
        gains = None
        if self.hybrid is not None:
            self.hybrid.close()
            statistics = self.hybrid.statistics()
            if self._gains:
                names = tuple(name for name, _ in self.model.named_parameters())
                gains = GainHistory(names, tuple(self._gain_steps), tuple(self._gains))
        return Arm(
            name=self.plan.name,
            description=self.plan.description,
            scheduled_steps=self.steps,
            evaluations=tuple(self._evaluations),
            training=tuple(
                Evaluation(step, cost, wall_s, float(loss))
                for step, cost, wall_s, loss in self._training
            ),
            forward_calls=self._forwards,
            backward_calls=self._backwards,
            samples=self._backwards * self.task.preset.batch_size,
            wall_s=self._wall_s,
            state_bytes=state_bytes,
            records=tuple(self._records),
            gains=gains,
            statistics=statistics,
        )


def tensor_bytes(states: Iterable[Any]) -> int:
    """Bytes of all tensors in per-parameter optimizer states."""
    return sum(
        value.nbytes
        for state in states
        for value in state.values()
        if isinstance(value, Tensor)
    )
