"""What a bare step takes while an arm runs: machines are not equally fast for long.

The time of the same bare step differs by a fifth from one half minute to the next, by
what neighbours do to shared caches and clocks; on a GPU too, where the host is what a
small step waits for. So every run is interleaved with steps of the bare base on the
same task, and its time is counted in those.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.arms import ARMS, Setup, Stepper
from benchmarks.counting import Meter

if TYPE_CHECKING:
    from benchmarks.runner import Task

__all__ = ["Pacer"]

EVERY_S = 0.4
"""Seconds of a run between two blocks of bare steps, at least."""
SHARE = 0.2
"""Of the run's time that bare steps may take, about."""


class Pacer:
    """Trains a model of its own with the bare base, a few steps at a time.

    Args:
        make: The task anew, and what a run of N steps of it is asked to do. Behind its
            last step the run begins again.
        clock: Seconds of wall time; for tests.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Task, Setup]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make, self._clock = make, clock
        self._done = 0
        self._stepper: Stepper
        self._renew()
        self.begin()

    def begin(self) -> None:
        """Forget what was measured: a run begins."""
        self.steps = 0
        self.wall_s = 0.0
        self.process_s = 0.0
        self._interval = EVERY_S
        self._last = self._clock()

    @property
    def due(self) -> bool:
        """Whether a block is; cheap enough to be asked at every step."""
        return self._clock() - self._last >= self._interval

    def block(self) -> None:
        """Bare steps for a fifth of the time since the last block, at least one.

        The first is not counted: it fetches what the run has driven out of the caches.
        The run's own first step behind the block does so on the clock, one in many.
        """
        started = self._clock()
        until = SHARE * (started - self._last)
        with _own_random_streams():
            if self._done + 2 > self._setup.steps:
                self._renew()
            self._step()
            meter, first = self._meter, self._done
            before = meter.wall_s, meter.process_s
            with meter.timed(self._device):
                while True:
                    self._step()
                    ended = self._done >= self._setup.steps
                    if ended or self._clock() - started >= until:
                        break
            self.steps += self._done - first
            self.wall_s += meter.wall_s - before[0]
            self.process_s += meter.process_s - before[1]
        self._last = self._clock()
        # Where two steps alone take long, a run has to be left alone for longer.
        self._interval = max(EVERY_S, (self._last - started) / SHARE)

    @property
    def step_wall_s(self) -> float:
        """Wall seconds of a bare step since ``begin``; nan before any."""
        return self.wall_s / self.steps if self.steps else float("nan")

    @property
    def step_process_s(self) -> float:
        """Process seconds of a bare step since ``begin``; nan before any."""
        return self.process_s / self.steps if self.steps else float("nan")

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights, gradients and the base's state."""
        kept: list[Tensor] = []
        for parameter in self._task.model.parameters():
            kept += (
                [parameter] if parameter.grad is None else [parameter, parameter.grad]
            )
            state = self._stepper.optimizer.state.get(parameter, {}).values()
            kept += [value for value in state if isinstance(value, Tensor)]
        return sum(t.nbytes for t in kept if t.device == self._device)

    def _step(self) -> None:
        begin_step = getattr(self._task, "begin_step", None)
        if begin_step is not None:
            begin_step(self._done, self._setup.steps)
        self._stepper.step()
        self._done += 1

    def _renew(self) -> None:
        """The task from its beginning, behind a first step that makes the state."""
        # One after the other, so that a GPU never holds two.
        self._task = self._stepper = self._meter = None  # type: ignore[assignment]
        gc.collect()
        with _own_random_streams():
            self._task, self._setup = self._make()
            self._device = next(self._task.model.parameters()).device
            meter = Meter(self._task.closure, getattr(self._task, "advance", None))
            self._meter = meter
            self._stepper = ARMS["base"].build(self._task.model, meter, self._setup)
            self._done = 0
            self._step()


def _own_random_streams() -> AbstractContextManager[None]:
    """What is drawn inside is not missing outside, dropout on a GPU included."""
    known = torch.cuda.is_available() and torch.cuda.is_initialized()
    context: AbstractContextManager[None] = torch.random.fork_rng(
        devices=list(range(torch.cuda.device_count())) if known else []
    )
    return context
