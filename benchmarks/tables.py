"""Markdown: classes by arms with targets, ablations, calibration, then every case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.arms import ARMS
from benchmarks.calibration import (
    CONFIDENCES,
    LEVELS,
    PREDICTORS,
    PROGRESS_EDGES,
    merged,
)
from benchmarks.estimates import Estimate
from benchmarks.suite import CaseResult
from benchmarks.summary import (
    TARGETS,
    ArmFigures,
    ClassFigures,
    against_default,
    arm_figures,
    class_figures,
    same_steps,
)

__all__ = ["case_table", "document"]

_READING = """Each number is how much longer the bare base takes to the same loss,
over what the arm took: above 1 the arm is faster. Geometric mean over the class,
[95 % bootstrap interval over seeds, paired]; with fewer than five seeds the bracket is
little more than the range over seeds. `>`: the arm ended below every loss that the base
was measured at, so the truth is higher; `<`: at least one case fell short of what was
measured, so it is lower. Nothing is extrapolated. *k*/*n*: only k of n cases could be
judged. Time is {clock}, evaluations excluded.
"""


def document(meta: dict[str, Any], results: Sequence[CaseResult]) -> str:
    """The whole result file."""
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    shared = f"{meta.get('jobs', 1)} jobs at once on {meta.get('cores', '?')} cores"
    sittings = meta.get("sittings", 1)
    parts = f", in {sittings} sittings (`--resume`)" if sittings > 1 else ""
    lines = [
        "# Time to equal loss",
        "",
        f"- command: `{meta['command']}`{parts}",
        f"- commit {meta['commit']}, {meta['date']}, scale {meta['scale']}, "
        f"seeds {meta['seeds']}",
        f"- {meta['hardware']}, {shared}, {meta['threads']} threads each, freed memory "
        f"{meta.get('memory', 'as malloc likes')}; {versions}",
        "",
        _incomplete(results),
        "## Classes and arms: speedup in time",
        "",
        _READING.format(clock=_clock(results)),
        _class_table(results, by_time=True),
        "",
        "The same in cost: a forward counts 1/3, a backward 2/3 of a real step.",
        "",
        _class_table(results, by_time=False),
        _same_table(results),
        _ablation_tables(results),
        _calibration_tables(results),
        "",
        "## Cases",
    ]
    for result in results:
        lines += ["", f"### {result.case} ({result.family})", ""]
        if result.skipped:
            lines.append(f"Skipped: {result.skipped}")
        elif result.runs:
            lines.append(case_table(result))
        else:
            lines.append("No run was made.")
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text + "\n"


def _clock(results: Sequence[CaseResult]) -> str:
    clocks = {r.clock for r in results}
    names = {"process": "process (CPU) time", "wall": "wall time, GPU work waited for"}
    paced = {r.clock for r in results if any(run.paced for run in r.runs)}
    names |= {c: f"{names[c]} in steps of the bare base in between" for c in paced}
    return " or ".join(names[c] for c in sorted(clocks)) or "-"


def _incomplete(results: Sequence[CaseResult]) -> str:
    """What was asked for and is not there; nothing may be missing silently."""
    lines = [f"- {r.case}: skipped. {r.skipped}" for r in results if r.skipped]
    lines += [
        f"- {r.case}: {what}" for r in results for what in (*r.errors, *r.missing)
    ]
    if not lines:
        return ""
    return "## Not run\n\n" + "\n".join(lines) + "\n"


def _headlines(results: Sequence[CaseResult], arm: str) -> dict[str, ClassFigures]:
    return {c.family: c for c in class_figures(results, arm) if c.headline}


def _families(results: Sequence[CaseResult]) -> list[str]:
    ran = dict.fromkeys(r.family for r in results if r.runs)
    return [f for f in TARGETS if f in ran] + [f for f in ran if f not in TARGETS]


def _arms(results: Sequence[CaseResult], *, ablations: bool) -> list[str]:
    ran = dict.fromkeys(r.arm for result in results for r in result.runs)
    known = [name for name in ("base:tuned", *ARMS) if name in ran and name != "base"]
    chosen = [name for name in known if name.startswith("hybrid:") == ablations]
    return sorted(chosen, key=lambda name: name not in ("hybrid", "base:tuned"))


def _class_table(results: Sequence[CaseResult], *, by_time: bool) -> str:
    arms = _arms(results, ablations=False)
    arms.sort(key=lambda name: name != "hybrid")
    figures = {arm: _headlines(results, arm) for arm in arms}
    rows = []
    for family in _families(results):
        target = TARGETS.get(family)
        first = figures.get("hybrid", {}).get(family)
        aims = f"{target.must:g}x / {target.reach:g}x" if target else "-"
        cases = [r for r in results if r.family == family]
        row = [family, f"{sum(bool(r.runs) for r in cases)}/{len(cases)}", aims]
        if by_time:
            row.append(_verdict(first))
        for arm in arms:
            found = figures[arm].get(family)
            row.append("-" if found is None else _cell(found, arm, by_time))
        rows.append(row)
    head = [
        "class",
        "cases run",
        "must / reach",
        *(["hybrid passes"] if by_time else []),
        *arms,
    ]
    return _table(head, rows)


def _verdict(first: ClassFigures | None) -> str:
    if first is None or first.target is None:
        return "-"
    worst = f", worst case {first.worst:.2f}x" if len(first.cases) > 1 else ""
    return {"pass": "yes", "fail": "**no**"}[first.verdict] + worst


def _cell(found: ClassFigures, arm: str, by_time: bool) -> str:
    estimate = found.time if by_time else found.cost
    # One number per peer keeps the table readable; their intervals are in the cases'.
    text = str(estimate) if arm == "hybrid" else estimate.short
    count = len(found.cases) + len(found.lost)
    return text + (f" *{len(found.cases)}/{count}*" if found.lost else "")


def _same_table(results: Sequence[CaseResult]) -> str:
    same = [
        [name, _percent(s.reduction), f"{s.loss:.4f}", f"{s.base_loss:.4f}", s.verdict]
        for name, s in same_steps(results).items()
    ]
    if not same:
        return ""
    head = ["same N, conservative", "fewer backwards", "loss", "bare base", "target"]
    text = (
        "\n## The same N scheduled steps\n\nTarget: at least 80 % fewer backwards at "
    )
    return text + "no higher loss.\n\n" + _table(head, same)


def _ablation_tables(results: Sequence[CaseResult]) -> str:
    arms = _arms(results, ablations=True)
    if not arms:
        return ""
    text = (
        "\n## Ablations\n\nSpeedup of each variant over that of the default, on the "
        "same cases and seeds: above 1 the variant is better. Each changes one part. "
        "`~`: both are bounds, so the quotient is none."
    )
    for by_time in (True, False):
        columns = {a: against_default(results, a, by_time=by_time) for a in arms}
        families = [
            f for f in _families(results) if any(f in c for c in columns.values())
        ]
        rows = [
            [
                arm.removeprefix("hybrid:"),
                ", ".join(ARMS[arm].changes),
                *(str(columns[arm][f]) if f in columns[arm] else "-" for f in families),
            ]
            for arm in arms
        ]
        text += f"\n\nIn {'time' if by_time else 'cost'}:\n\n"
        text += _table(["variant", "change", *families], rows)
    return text


def _calibration_tables(results: Sequence[CaseResult]) -> str:
    """What the default's (and each predictor's) forecasts were worth."""
    rows, found = [], {}
    for arm in PREDICTORS:
        notes = merged(
            r.calibration for result in results for r in result.runs if r.arm == arm
        )
        if notes is None or not notes["loss"][0]:
            continue
        found[arm] = notes
        count, *within = notes["loss"]
        shown = [within[LEVELS.index(level)] / count for level in (0.5, 0.8, 0.95)]
        spread = math.sqrt(notes["loss_squares"] / count)
        total = [sum(row[i] for row in notes["progress"]) for i in range(3)]
        delivered = total[2] / total[1] if total[1] else math.nan
        rows.append(
            [arm, str(count), *(_percent(s) for s in shown), f"{spread:.2f}",
             str(total[0]), f"{delivered:.2f}"]
        )  # fmt: skip
    if not rows:
        return ""
    head = ["arm", "loss forecasts", "in 50 % interval", "in 80 %", "in 95 %",
            "rms error / sigma", "moves", "progress measured / expected"]  # fmt: skip
    text = (
        "\n## Calibration\n\nThe predictor says what the loss of the next real step "
        "will be, with a deviation, and how many base steps a move is worth. A "
        "calibrated one has its nominal shares in the intervals, an rms error of 1 and "
        "a quotient of 1. Progress is measured by the gradients at both ends of a "
        "move.\n\n"
    )
    text += _table(head, rows)
    if "hybrid" in found:
        text += "\n\n" + _progress_table(found["hybrid"])
    return text


def _progress_table(notes: dict[str, Any]) -> str:
    edges = ["0", *(f"{e:g}" for e in PROGRESS_EDGES), "inf"]
    rows = [
        [f"{edges[i]} to {edges[i + 1]}", str(n), f"{said / n:.3f}", f"{came / n:.3f}"]
        for i, (n, said, came) in enumerate(notes["progress"])
        if n
    ]
    text = _table(
        ["progress expected", "moves", "mean expected", "mean measured"], rows
    )
    sure = [
        [
            f"{i / CONFIDENCES:.1f} to {(i + 1) / CONFIDENCES:.1f}",
            str(n),
            _percent(half / n),
            f"{came / said:.2f}" if said else "-",
        ]
        for i, (n, _, half, said, came) in enumerate(notes["confidence"])
        if n
    ]
    head = ["confidence", "moves", "delivered at least half", "measured / expected"]
    return text + "\n\n" + _table(head, sure)


def case_table(result: CaseResult) -> str:
    """Every arm and length of a case."""
    figures = arm_figures(result)
    apart = any(not math.isnan(f.objective) for f in figures)
    time = "process time" if result.clock == "process" else "wall time"
    head = ["arm", "length", "seeds", "loss", "base, same N"]
    head += [] if result.mode == "target" else ["base, same cost"]
    head += ["speedup in " + time, "in cost"]
    head += ["training objective", "in cost at equal objective"] if apart else []
    head += ["fewer backwards", "validations", "wall s", "memory", "bookkeeping"]
    head += ["failed"] if any(f.failures for f in figures) else []
    return _table(head, [_row(f, result, head) for f in figures])


def _row(f: ArmFigures, result: CaseResult, head: Sequence[str]) -> list[str]:
    cells = {
        "arm": f.arm,
        "length": f"{f.fraction:g} N",
        "seeds": str(f.seeds),
        "loss": f"{f.loss:.5g}",
        "base, same N": _number(f.base_loss),
        "base, same cost": _number(f.base_loss_same_cost),
        "speedup in process time": _speedup(f.time_speedup("process")),
        "speedup in wall time": _speedup(f.time_speedup("wall")),
        "in cost": _speedup(f.cost_speedup),
        "training objective": _number(f.objective),
        "in cost at equal objective": _speedup(f.objective_speedup),
        "fewer backwards": _percent(f.backward_reduction),
        "validations": f"{f.validations:.0f}",
        "wall s": f"{f.wall_s:.2f}",
        "memory": f"{f.peak_bytes / 2**20:.1f} MiB",
        "bookkeeping": _percent(f.bookkeeping_share),
        "failed": f"{f.failures}/{f.seeds}" if f.failures else "",
    }
    return [cells[name] for name in head]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5g}"


def _speedup(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
