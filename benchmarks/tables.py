"""Markdown: one table per case, one summary by class with targets and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.estimates import Estimate
from benchmarks.suite import CaseResult
from benchmarks.summary import ArmFigures, arm_figures, class_figures, same_steps

__all__ = ["case_table", "document", "summary_table"]


def document(meta: dict[str, Any], results: Sequence[CaseResult]) -> str:
    """The whole result file: provenance, summary, then every case."""
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    lines = [
        "# Time to equal loss",
        "",
        f"- command: `{meta['command']}`",
        f"- commit {meta['commit']}, {meta['date']}, scale {meta['scale']}, "
        f"seeds {meta['seeds']}",
        f"- {meta['hardware']}, {meta['threads']} threads; {versions}",
        "",
        summary_table(results),
    ]
    for result in results:
        lines += ["", f"## {result.case} ({result.family})", ""]
        lines.append(result.skipped or case_table(result))
    return "\n".join(lines) + "\n"


def summary_table(results: Sequence[CaseResult]) -> str:
    """Class means of hybridopt and of every other arm, and the same-N table."""
    arms = dict.fromkeys(
        r.arm for result in results for r in result.runs if r.arm != "base"
    )
    ordered = sorted(arms, key=lambda name: (not name.startswith("hybrid"), name))
    rows = [
        [
            c.family,
            c.arm,
            f"{c.fraction:g} N",
            str(len(c.cases)),
            str(c.cost),
            str(c.wall),
            str(c.process),
            f"{c.worst:.2f}x",
            f"{c.target.must:g}x / {c.target.reach:g}x" if c.target else "-",
            c.verdict if c.arm == "hybrid" and c.headline else "",
        ]
        for arm in ordered
        for c in class_figures(results, arm)
    ]
    rows.sort(key=lambda row: row[0])
    head = ["class", "arm", "length", "cases", "cost", "wall time", "process time"]
    head += ["worst case", "must / reach", "verdict"]
    text = (
        "## Summary\n\nSpeedup at equal loss over the bare base; geometric mean over "
    )
    text += "the class [95 % interval over seeds]. Verdicts are by time at the length "
    text += "that was fixed for the class beforehand: wall time on a GPU, process time "
    text += "on a CPU, which others may share.\n\n" + _table(head, rows)
    same = [
        [name, _percent(s.reduction), f"{s.loss:.4f}", f"{s.base_loss:.4f}", s.verdict]
        for name, s in same_steps(results).items()
    ]
    if same:
        head = ["same N, conservative", "fewer backwards", "loss", "bare base", ""]
        text += "\n\nTarget: at least 80 % fewer backwards at no higher loss.\n\n"
        text += _table(head, same)
    return text


def case_table(result: CaseResult) -> str:
    """Every arm and length of a case."""
    head = [
        "arm", "length", "loss", "base, same N", "cost", "wall time", "process time",
        "fewer backwards", "validations", "wall s", "memory", "bookkeeping", "failed",
    ]  # fmt: skip
    return _table(head, [_row(f) for f in arm_figures(result)])


def _row(f: ArmFigures) -> list[str]:
    share = "" if math.isnan(f.bookkeeping_share) else _percent(f.bookkeeping_share)
    return [
        f.arm,
        f"{f.fraction:g} N",
        f"{f.loss:.5g}",
        f"{f.base_loss:.5g}",
        _speedup(f.cost_speedup),
        _speedup(f.wall_speedup),
        _speedup(f.process_speedup),
        _percent(f.backward_reduction),
        f"{f.validations:.0f}",
        f"{f.wall_s:.2f}",
        f"{f.peak_bytes / 2**20:.1f} MiB",
        share,
        f"{f.failures}/{f.seeds}" if f.failures else "",
    ]


def _speedup(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
