"""Live progress of several runs: a table of bars on a terminal, plain lines elsewhere.

Shows what was measured and counted so far, nothing else. Drawing is throttled, so that
the display costs little however fast the steps are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from hybridopt.errors import RecoveryAction
from hybridopt.telemetry.extras import require
from hybridopt.types import StepRecord

__all__ = ["Display", "PlainDisplay", "RichDisplay", "RunProgress", "open_display"]

Clock = Callable[[], float]


@dataclass(slots=True)
class RunProgress:
    """Where one run stands."""

    name: str
    total_steps: int
    steps: int = 0
    loss: float = math.nan
    """Last measured loss."""
    validation_loss: float = math.nan
    """Last loss on the held-out set."""
    phase: str = "-"
    """Phase of the last step; '-' for a bare optimizer."""
    confidence: float = math.nan
    """Last confidence that the predictor gave a move."""
    real_steps: int = 0
    predicted_steps: int = 0
    rolled_back_steps: int = 0
    active_s: float = 0.0
    """Seconds of training so far."""
    reported_steps: int = field(default=0, repr=False)
    """Steps at the last plain line."""

    def take(self, loss: float | None, record: StepRecord | None) -> None:
        """Take in one step.

        Args:
            loss: Measured loss; None when not known (yet).
            record: The hybrid optimizer's record; None for a bare optimizer.
        """
        self.steps += 1
        if record is None:
            self.real_steps += 1
        else:
            self.phase = record.phase.value
            rolled_back = record.action is RecoveryAction.ROLL_BACK
            self.rolled_back_steps += rolled_back
            self.predicted_steps += record.loss_predicted
            self.real_steps += not record.loss_predicted and not rolled_back
            if not record.loss_predicted:
                self.confidence = record.confidence
        if loss is not None:
            self.loss = loss

    @property
    def eta_s(self) -> float:
        """Seconds of training left at the pace so far; nan before the first step."""
        if self.steps == 0:
            return math.nan
        return self.active_s / self.steps * (self.total_steps - self.steps)

    @property
    def done(self) -> bool:
        """Whether all scheduled steps were made."""
        return self.steps >= self.total_steps


class Display(Protocol):
    """What a training loop talks to."""

    def add(self, name: str, total_steps: int) -> RunProgress:
        """Announce a run; the loop updates the returned object."""

    def refresh(self, progress: RunProgress) -> None:
        """Show the newest state, if it is time to."""

    def say(self, text: str) -> None:
        """Show one line of text and keep it."""

    def close(self) -> None:
        """Show the final state and leave the terminal as it was."""


def open_display(stream: TextIO, interactive: bool | None = None) -> Display:
    """The display that fits the stream.

    Args:
        stream: Where to draw.
        interactive: True for bars, False for lines, None to ask the stream.

    Raises:
        HybridError: Bars are wanted and rich is not installed.
    """
    if interactive is None:
        interactive = stream.isatty()
    return RichDisplay(stream) if interactive else PlainDisplay(stream)


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class PlainDisplay:
    """One line per run every few seconds or every twentieth of the run."""

    def __init__(
        self, stream: TextIO, interval_s: float = 5.0, clock: Clock = time.monotonic
    ) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._last_s: dict[str, float] = {}
        self._runs: list[RunProgress] = []

    def add(self, name: str, total_steps: int) -> RunProgress:
        """Announce a run; the loop updates the returned object."""
        progress = RunProgress(name, total_steps)
        self._runs.append(progress)
        self._last_s[name] = self._clock()
        return progress

    def refresh(self, progress: RunProgress) -> None:
        """Write a line when 5 seconds or 5 % of the run have passed, and at the end."""
        if progress.steps == progress.reported_steps:
            return
        now = self._clock()
        waited = now - self._last_s[progress.name] >= self._interval_s
        gone = progress.steps - progress.reported_steps >= progress.total_steps / 20
        if waited or gone or progress.done:
            self._last_s[progress.name] = now
            progress.reported_steps = progress.steps
            self.say(plain_line(progress))

    def say(self, text: str) -> None:
        """Write one line."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Write the last line of every run that stopped between two lines."""
        for progress in self._runs:
            if progress.steps != progress.reported_steps:
                progress.reported_steps = progress.steps
                self.say(plain_line(progress))


def plain_line(progress: RunProgress) -> str:
    """One run in one line of text."""
    share = progress.steps / max(1, progress.total_steps)
    parts = [
        f"{progress.name:<10} {progress.steps:>5}/{progress.total_steps} {share:4.0%}",
        f"loss {_number(progress.loss)}",
        f"held-out {_number(progress.validation_loss)}",
    ]
    if progress.phase != "-":
        parts += [
            f"phase {progress.phase}",
            f"confidence {_number(progress.confidence, 2)}",
            f"real {progress.real_steps}, predicted {progress.predicted_steps}, "
            f"rolled back {progress.rolled_back_steps}",
        ]
    if not progress.done:
        parts.append(f"ETA {_duration(progress.eta_s)}")
    return " | ".join(parts)


class RichDisplay:
    """A live table with one bar per run.

    Raises:
        HybridError: rich is not installed.
    """

    def __init__(
        self, stream: TextIO, interval_s: float = 0.2, clock: Clock = time.monotonic
    ) -> None:
        console = require("rich.console", "the live display").Console(file=stream)
        live = require("rich.live", "the live display")
        self._runs: list[RunProgress] = []
        self._interval_s = interval_s
        self._clock = clock
        self._last_s = -math.inf
        # No refresh thread: it would take time from the training that is being timed.
        self._live = live.Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def add(self, name: str, total_steps: int) -> RunProgress:
        """Announce a run; the loop updates the returned object."""
        progress = RunProgress(name, total_steps)
        self._runs.append(progress)
        self._draw()
        return progress

    def refresh(self, progress: RunProgress) -> None:
        """Redraw when a fifth of a second has passed, and at the end of a run."""
        now = self._clock()
        if now - self._last_s >= self._interval_s or progress.done:
            self._last_s = now
            self._draw()

    def say(self, text: str) -> None:
        """Print one line above the table."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the final state and give the terminal back."""
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(_table(self._runs), refresh=True)


def _table(runs: list[RunProgress]) -> Any:
    """Two lines per run, within 80 columns: bar and losses, phase and counts."""
    table = require("rich.table", "the live display").Table
    bar = require("rich.progress_bar", "the live display").ProgressBar
    group = require("rich.console", "the live display").Group
    text = require("rich.text", "the live display").Text
    blocks = []
    for run in runs:
        grid = table.grid(padding=(0, 2))
        for width in (10, 14, 9, 11, 15, 9):
            grid.add_column(width=width, no_wrap=True)
        grid.add_row(
            run.name,
            bar(
                total=max(1, run.total_steps),
                completed=run.steps,
                width=14,
                complete_style="cyan",
                finished_style="green",
            ),
            f"{run.steps}/{run.total_steps}",
            f"loss {_number(run.loss)}",
            f"held-out {_number(run.validation_loss)}",
            "done" if run.done else f"ETA {_duration(run.eta_s)}",
        )
        blocks.append(grid)
        if run.phase != "-":
            blocks.append(text(" " * 12 + _counts(run), style="dim"))
    return group(*blocks)


def _counts(run: RunProgress) -> str:
    """Phase, confidence and step counts of a hybrid run."""
    return (
        f"{run.phase}, confidence {_number(run.confidence, 2)}: "
        f"{run.real_steps} real, {run.predicted_steps} predicted, "
        f"{run.rolled_back_steps} rolled back"
    )
