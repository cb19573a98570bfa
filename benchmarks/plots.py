"""Loss against cost, per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runner import Run
from benchmarks.suite import CaseResult

__all__ = ["draw_case"]


def draw_case(result: CaseResult, path: Path) -> bool:
    """Draw one case to ``path`` (SVG); False, with nothing written, where matplotlib is
    missing or the case has no runs.

    Schedule mode shows the end of every base run as the curve that arms are judged by;
    target mode shows the course of every arm. Thin lines are seeds.
    """
    if not result.runs:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    # Without a display and without touching the user's own figures.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    if result.mode == "target":
        _draw_courses(axes, result)
        axes.set_yscale("log")
    else:
        _draw_ends(axes, result)
    axes.set(
        xscale="log",
        xlabel="cost in real steps (forward 1/3, backward 2/3)",
        ylabel="loss",
        title=f"{result.case}: {result.family}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _arms(result: CaseResult) -> list[str]:
    return list(dict.fromkeys(r.arm for r in result.runs))


def _draw_ends(axes: Any, result: CaseResult) -> None:
    for number, arm in enumerate(_arms(result)):
        for position, seed in enumerate(sorted({r.seed for r in result.runs})):
            runs = [r for r in result.runs if r.arm == arm and r.seed == seed]
            ends = sorted((r.cost, r.final_loss) for r in runs)
            axes.plot(
                [cost for cost, _ in ends],
                [loss for _, loss in ends],
                marker="o",
                markersize=4,
                linestyle="-" if arm == "base" else ":",
                linewidth=1,
                color=f"C{number % 10}",
                label=arm if position == 0 else None,
            )


def _draw_courses(axes: Any, result: CaseResult) -> None:
    for number, arm in enumerate(_arms(result)):
        runs: Sequence[Run] = [r for r in result.runs if r.arm == arm]
        for position, r in enumerate(runs):
            points = [p for p in r.points if p.cost > 0]
            axes.plot(
                [p.cost for p in points],
                [p.loss for p in points],
                linewidth=1,
                color=f"C{number % 10}",
                label=arm if position == 0 else None,
            )
