"""Result files: strict JSON, rounded, small enough to keep beside the code."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration import PREDICTORS
from benchmarks.runner import Point, Run
from benchmarks.suite import CaseResult

__all__ = ["decode", "encode", "load", "save", "thinned"]

DIGITS = 6
"""Significant digits of a stored float; results differ far above that."""
KEPT_POINTS = 24
_POINT = ("step", "cost", "wall_s", "process_s", "loss")


def encode(meta: dict[str, Any], results: Sequence[CaseResult]) -> str:
    """One line per run. Numbers that are not finite become null."""
    lines = []
    for result in results:
        head = {k: v for k, v in result.__dict__.items() if k != "runs"}
        runs = [
            json.dumps(_plain(_run_values(r)), allow_nan=False) for r in result.runs
        ]
        text = json.dumps(_plain(head), allow_nan=False)[:-1]
        lines.append(text + ', "runs": [\n' + ",\n".join(runs) + "\n]}")
    head = json.dumps(_plain(meta), allow_nan=False)
    return f'{{"meta": {head},\n"cases": [\n' + ",\n".join(lines) + "\n]}\n"


def decode(text: str) -> tuple[dict[str, Any], list[CaseResult]]:
    """What ``encode`` was given, up to rounding and the points it left out."""
    values = json.loads(text)
    results = []
    for case in values["cases"]:
        runs = [_run(dict(r)) for r in case.pop("runs")]
        results.append(CaseResult(**case, runs=runs))
    return values["meta"], results


def save(path: Path, meta: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """Write beside and rename: whoever interrupts finds the old file or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(encode(meta, results), "utf-8")
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[CaseResult]]:
    """Read a result file.

    Raises:
        ValueError: It is none, or one of another format.
    """
    try:
        return decode(path.read_text("utf-8"))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as wrong:
        raise ValueError(
            f"{path}: no result file of this version ({type(wrong).__name__}). "
            "Run the benchmark again."
        ) from None


def thinned(points: Sequence[Point], count: int = KEPT_POINTS) -> list[Point]:
    """About ``count`` points, evenly in the logarithm of the step, ends included."""
    if len(points) <= count:
        return list(points)
    last = points[-1].step
    ratio = max(last, 2) ** (1.0 / (count - 2))
    kept, bound = [points[0]], 0.0
    for point in points[1:-1]:
        if point.step >= bound:
            kept.append(point)
            bound = max(1, point.step) * ratio
    return [*kept, points[-1]]


def _run_values(r: Run) -> dict[str, Any]:
    values = r.to_dict()
    # Courses are drawn, not judged by: what speed is computed from has fields of its
    # own, and one seed's course shows what there is to see.
    first = r.seed == 0 and bool(r.reached or r.fraction == 1.0)
    points = thinned(r.points) if first else r.points[-1:]
    if r.arm not in PREDICTORS:
        values.pop("calibration")
    values["points"] = [[getattr(p, name) for name in _POINT] for p in points]
    return {k: v for k, v in values.items() if v not in ("", [], {}, None)}


def _run(values: dict[str, Any]) -> Run:
    rows = values.pop("points", [])
    points = [Point(**dict(zip(_POINT, map(_nan, r), strict=True))) for r in rows]
    known = {k: math.nan if v is None else v for k, v in values.items()}
    return Run(**known, points=points)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
