"""One picture per class, loss against cost and against time, and one of calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration import LEVELS, merged
from benchmarks.runner import Run
from benchmarks.suite import CaseResult
from benchmarks.summary import COST, PROCESS, WALL

__all__ = ["draw", "draw_calibration", "draw_class"]

_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#D55E00")
"""Okabe and Ito's palette, which the colour-blind can tell apart; two rounds of it, the
second dashed."""


def draw(results: Sequence[CaseResult], stem: Path) -> list[Path]:
    """Draw every class and the calibration beside ``stem``; nothing without matplotlib.

    Returns:
        The files written.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    # Without a display, and text as text: a tenth of the size.
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    written = []
    for family in dict.fromkeys(r.family for r in results if r.runs):
        name = "-".join("".join(c if c.isalnum() else " " for c in family).split())
        path = stem.with_name(f"{stem.name}_{name}.svg")
        draw_class([r for r in results if r.family == family and r.runs], path)
        written.append(path)
    path = stem.with_name(f"{stem.name}_calibration.svg")
    if draw_calibration(results, path):
        written.append(path)
    return written


def draw_class(results: Sequence[CaseResult], path: Path) -> None:
    """One row per case, cost on the left, time on the right.

    Schedule mode: the ends of the base's runs are the curve that the arms' ends (means
    over seeds) are judged by: left of it and below is better. Target mode: the course
    of the first seed.
    """
    from matplotlib import pyplot

    rows = len(results)
    figure, grid = pyplot.subplots(
        rows, 2, figsize=(10, 0.8 + 2.9 * rows), squeeze=False, layout="constrained"
    )
    styles = _styles(results)
    for result, row in zip(results, grid, strict=True):
        time = PROCESS if result.clock == "process" else WALL
        unit = "bare steps" if all(r.paced for r in result.runs) else "s"
        units = (
            "cost, real steps (forward 1/3, backward 2/3)",
            f"{result.clock} time, {unit}",
        )
        for axes, amount, unit in zip(row, (COST, time), units, strict=True):
            _draw(axes, result, amount, styles)
            axes.set(xscale="log", xlabel=unit, ylabel="loss", title=result.case)
            _plain_ticks(axes.xaxis)
            if result.mode == "target":
                axes.set_yscale("log")
            else:
                _leave_out_of_sight(axes, result)
            axes.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=6,
        fontsize=8,
    )
    figure.savefig(path)
    pyplot.close(figure)


def _leave_out_of_sight(axes: Any, result: CaseResult) -> None:
    """Cut the picture above the bare base and hybridopt, where an arm that diverged
    would make a line of all the others.
    """
    ends = [r.final_loss for r in result.runs if r.arm in ("base", "hybrid")]
    known = [loss for loss in ends if math.isfinite(loss)]
    if not known:
        return
    low, high = min(known), max(known)
    if axes.get_ylim()[1] > high + 10.0 * (high - low) > high:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... in plain digits: powers of ten, where an axis spans two decades,
    leave it without a number or write them into each other. Powers of ten alone where
    it spans more than three decades, which have no room for the others.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first, last = axis.get_view_interval()
    between = (1.0,) if last > 1e3 * first > 0.0 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=between))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _styles(results: Sequence[CaseResult]) -> dict[str, dict[str, Any]]:
    arms = dict.fromkeys(
        r.arm for result in results for r in result.runs if ":" not in r.arm
    )
    special = {
        "base": {"color": "black", "linewidth": 1.6, "zorder": 3},
        "hybrid": {"color": "#D00000", "linewidth": 2.0, "zorder": 4},
        "base:tuned": {"color": "0.5", "linewidth": 1.2, "linestyle": "--"},
        "hypergradient:tensor": {"color": "0.7", "linewidth": 1.0},
    }
    peers = [arm for arm in arms if arm not in special]
    for i, arm in enumerate(peers):
        line = "-" if i < len(_COLOURS) else ":"
        color = _COLOURS[i % len(_COLOURS)]
        special[arm] = {"color": color, "linewidth": 1.0, "linestyle": line}
        if i >= len(_COLOURS):
            # One point shows no line style.
            special[arm]["marker"] = "D"
    return special


def _draw(axes: Any, result: CaseResult, amount: int, styles: dict[str, Any]) -> None:
    for arm, style in styles.items():
        # Ablations are told apart by the table; twenty more lines tell nothing.
        runs = [r for r in result.runs if r.arm == arm]
        if not runs:
            continue
        if result.mode == "target":
            line = _course(min(runs, key=lambda r: r.seed), amount)
        else:
            line = _ends(runs, amount)
        marked = {"marker": "o", **style, "markersize": 4}
        if result.mode == "target":
            marked["marker"] = ""
        axes.plot(*line, label=arm, **marked)


def _course(run: Run, amount: int) -> tuple[list[float], list[float]]:
    points = [p for p in run.points if p.step > 0]
    return [run.amounts(p)[amount] for p in points], [p.loss for p in points]


def _ends(runs: Sequence[Run], amount: int) -> tuple[list[float], list[float]]:
    xs, ys = [], []
    for fraction in sorted({r.fraction for r in runs}):
        chosen = [r for r in runs if r.fraction == fraction and not r.failure]
        if chosen:
            xs.append(sum(r.amounts(r)[amount] for r in chosen) / len(chosen))
            ys.append(sum(r.final_loss for r in chosen) / len(chosen))
    return xs, ys


def draw_calibration(results: Sequence[CaseResult], path: Path) -> bool:
    """Coverage of the loss forecasts, and measured against expected progress, per class
    and for the default configuration; False, and nothing written, without any.
    """
    notes = {
        family: merged(
            r.calibration
            for result in results
            if result.family == family
            for r in result.runs
            if r.arm == "hybrid"
        )
        for family in dict.fromkeys(r.family for r in results)
    }
    known = {family: found for family, found in notes.items() if found}
    if not any(found["loss"][0] for found in known.values()):
        return False
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4.6), layout="constrained"
    )
    for i, (family, found) in enumerate(known.items()):
        line = "-" if i < len(_COLOURS) else ":"
        style = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": line,
            "label": family,
        }
        count, *within = found["loss"]
        if count:
            shares = [w / count for w in within]
            left.plot(LEVELS, shares, marker="o", markersize=3, **style)
        bins = [(said / n, came / n) for n, said, came in found["progress"] if n >= 5]
        right.plot(
            [said for said, _ in bins],
            [came for _, came in bins],
            marker="o",
            markersize=3,
            **style,
        )
    left.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    left.set(xlabel="nominal share of the interval", ylabel="share of losses inside it")
    left.set(title="loss forecast")
    ends = [0.01, 2.0 ** math.ceil(math.log2(32))]
    right.plot(ends, ends, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="progress expected, base steps", title="moves")
    right.set_yscale("symlog", linthresh=0.05)
    right.set(ylabel="progress measured")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
    return True
