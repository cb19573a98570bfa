"""What the pictures of a report show.

Only measured points are drawn; curves of mini-batch losses are smoothed by a running
mean, and the axis says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from hybridopt.errors import RecoveryAction
from hybridopt.telemetry.comparison import Arm, Comparison, GainHistory
from hybridopt.telemetry.extras import require
from hybridopt.telemetry.picture import INK
from hybridopt.types import Level, Phase, StepRecord

__all__ = [
    "forecast_pairs",
    "plot_forecasts",
    "plot_gains",
    "plot_horizons",
    "plot_loss_by_cost",
    "plot_loss_by_step",
    "plot_mean_gain",
    "plot_records",
]

Axes = Any
_COLORS = ("#8a8f98", "#2f7fdb", "#c9821b")
"""Bare, hybrid, shortened."""
_PHASES = {
    Phase.WARMUP: ("#9a6fd0", "warm-up"),
    Phase.PREDICT: ("#2fa36b", "predict"),
    Phase.CORRECT: ("#c9821b", "correct"),
}
_ROLLBACK = "#d64545"
_BINS = 160


# -- pieces ----------------------------------------------------------------------------


def _window(points: int) -> int:
    """Length of the running mean over mini-batch losses."""
    return max(1, points // 20)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` finite values."""
    smoothed: list[float] = []
    for index in range(len(values)):
        recent = [
            v
            for v in values[max(0, index - window + 1) : index + 1]
            if math.isfinite(v)
        ]
        smoothed.append(sum(recent) / len(recent) if recent else math.nan)
    return smoothed


def _shade_phases(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Shade each stretch of steps by the share of its steps in each phase."""
    if not records:
        return
    bins = min(_BINS, len(records))
    present = set()
    for index in range(bins):
        part = records[
            index * len(records) // bins : (index + 1) * len(records) // bins
        ]
        for phase, (color, _) in _PHASES.items():
            share = sum(record.phase is phase for record in part) / len(part)
            if share:
                present.add(phase)
                # A record of step s stands for the stretch from s to s + 1.
                axes.axvspan(
                    part[0].step,
                    part[-1].step + 1,
                    color=color,
                    alpha=0.3 * share,
                    linewidth=0,
                    zorder=0,
                )
    for phase in (phase for phase in _PHASES if phase in present):
        color, name = _PHASES[phase]
        axes.fill_between([], [], color=color, alpha=0.3, label=f"phase: {name}")


def _mark_rollbacks(axes: Axes, records: Sequence[StepRecord]) -> None:
    steps = [r.step for r in records if r.action is RecoveryAction.ROLL_BACK]
    for index, step in enumerate(steps):
        label = "rolled back" if index == 0 else None
        axes.axvline(step, color=_ROLLBACK, linewidth=1, linestyle=":", label=label)


def _grid(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.2, linewidth=0.6, color=_COLORS[0])
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)


# -- pictures --------------------------------------------------------------------------


def plot_loss_by_step(axes: Axes, comparison: Comparison) -> None:
    """Loss against scheduled steps, the hybrid run's phases shaded."""
    _shade_phases(axes, comparison.hybrid.records)
    longest = max(len(arm.training) for arm in comparison.arms)
    window = _window(longest)
    for arm, color in zip(comparison.arms, _COLORS, strict=False):
        steps = [point.step for point in arm.training]
        losses = _smooth([point.loss for point in arm.training], window)
        axes.plot(steps, losses, color=color, linewidth=0.8, alpha=0.6)
        _evaluations(axes, arm, color, lambda point: point.step)
    _mark_rollbacks(axes, comparison.hybrid.records)
    _grid(axes, "scheduled steps", f"loss (nats/byte); thin: mean of {window}")


def plot_loss_by_cost(axes: Axes, comparison: Comparison) -> None:
    """Held-out loss against cost, with the costs at equal loss."""
    for arm, color in zip(comparison.arms, _COLORS, strict=False):
        _evaluations(axes, arm, color, lambda point: point.cost)
    equal = comparison.equal_loss()
    if equal is not None:
        axes.plot(
            [equal.hybrid.cost, equal.bare.cost],
            [equal.loss, equal.loss],
            color=INK,
            linewidth=1,
            linestyle="--",
            marker="|",
            markersize=12,
            label=f"equal loss {equal.loss:.4f}: {equal.hybrid.cost:.0f} "
            f"instead of {equal.bare.cost:.0f}",
        )
    _grid(
        axes,
        "cost (real steps: forward 1/3, backward 2/3)",
        "held-out loss (nats/byte)",
    )


def _evaluations(
    axes: Axes, arm: Arm, color: str, place: Callable[[Any], float]
) -> None:
    axes.plot(
        [place(point) for point in arm.evaluations],
        [point.loss for point in arm.evaluations],
        color=color,
        linewidth=1.8,
        marker="o",
        markersize=3,
        label=arm.name,
    )


def plot_forecasts(axes: Axes, records: Sequence[StepRecord]) -> None:
    """The loss expected at the end of each Predict phase against the one measured."""
    pairs = forecast_pairs(records)
    expected = [pair[0] for pair in pairs]
    measured = [pair[1] for pair in pairs]
    low, high = min(expected + measured), max(expected + measured)
    axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle="--")
    axes.scatter(expected, measured, s=14, color=_COLORS[1], alpha=0.7, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    _grid(
        axes,
        "expected loss (nats/byte)",
        "measured loss of the next batch (nats/byte)",
    )


def forecast_pairs(records: Sequence[StepRecord]) -> list[tuple[float, float]]:
    """(expected, measured) loss where a measurement directly follows a prediction."""
    pairs = []
    for before, after in itertools.pairwise(records):
        if before.loss_predicted and not after.loss_predicted:
            pair = (before.loss, after.loss)
            if all(math.isfinite(value) for value in pair):
                pairs.append(pair)
    return pairs


def plot_horizons(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Which horizon each real step chose."""
    chosen = [(r.step, r.horizon) for r in records if not r.loss_predicted]
    axes.scatter(
        [step for step, _ in chosen],
        [horizon for _, horizon in chosen],
        s=12,
        color=_COLORS[1],
        alpha=0.6,
        linewidths=0,
    )
    axes.set_ylim(bottom=-0.5)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _grid(axes, "scheduled steps", "horizon (steps)")


def plot_gains(axes: Axes, history: GainHistory) -> None:
    """Gain of every tensor on the step direction over time, as a heat map."""
    colors = require("matplotlib.colors", "the report")
    rows = [list(column) for column in zip(*history.gains, strict=True)]
    largest = max((abs(g) for row in rows for g in row if math.isfinite(g)), default=0)
    norm = colors.SymLogNorm(linthresh=0.1, vmin=0.0, vmax=max(largest, 0.2))
    # Samples are nearly evenly spaced; edges halfway between them place each one right.
    steps = list(history.steps)
    edges = [
        steps[0],
        *((a + b) / 2 for a, b in itertools.pairwise(steps)),
        steps[-1] + 1,
    ]
    places = list(range(len(rows) + 1))
    mesh = axes.pcolormesh(
        edges, places, rows, norm=norm, cmap="viridis", rasterized=True
    )
    axes.set_yticks([place + 0.5 for place in places[:-1]], history.names, fontsize=7)
    axes.invert_yaxis()
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.set_label("gain (multiples of the last real step)")
    ticks = [t for t in (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300) if t <= norm.vmax]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_xlabel("scheduled steps")


def plot_records(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Measured losses of one run by step, phases shaded, monitor alarms marked."""
    _shade_phases(axes, records)
    real = [r for r in records if not r.loss_predicted]
    window = _window(len(real))
    axes.plot(
        [r.step for r in real],
        _smooth([r.loss for r in real], window),
        color=_COLORS[1],
        linewidth=1.2,
        label="measured loss",
    )
    alarms = [r for r in real if r.verdict is not Level.OK and math.isfinite(r.loss)]
    if alarms:
        axes.scatter(
            [r.step for r in alarms],
            [r.loss for r in alarms],
            s=18,
            color=_ROLLBACK,
            marker="x",
            label="monitor alarm",
        )
    _mark_rollbacks(axes, records)
    _grid(axes, "scheduled steps", f"loss, mean of {window} batches")


def plot_mean_gain(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Mean gain over tensors and learning rate of every real step."""
    real = [r for r in records if not r.loss_predicted]
    steps = [r.step for r in real]
    axes.plot(steps, [r.gain for r in real], color=_COLORS[1], label="mean gain")
    other = axes.twinx()
    rates = [r.learning_rate for r in real]
    other.plot(steps, rates, color=_COLORS[2], linestyle="--", label="learning rate")
    other.set_ylabel("learning rate (dashed)")
    other.spines["right"].set_visible(True)
    _grid(axes, "scheduled steps", "mean gain (last real steps)")
