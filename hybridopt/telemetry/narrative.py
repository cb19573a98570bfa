"""Measured numbers as a table and in plain words, also when prediction did not pay.

Every sentence is made from fields of the runs; what was not measured is left out or
said to be missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridopt.errors import RecoveryAction
from hybridopt.telemetry.comparison import (
    Arm,
    Comparison,
    EqualLoss,
    Evaluation,
    reach,
)
from hybridopt.types import Mover

__all__ = ["Row", "describe", "format_table", "seed_rows", "summary_rows"]

MISSING = "-"
NOT_REACHED = "not reached"
_NOISE = 0.03
"""Relative difference in cost below which nothing is claimed."""
_SEED_SPREAD = 0.02
"""Relative difference of final losses that a single seed does not settle."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    label: str
    cells: tuple[str, ...]


def _bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _point(point: Evaluation | None, show: Callable[[Evaluation], str]) -> str:
    return NOT_REACHED if point is None else show(point)


def _counted(arm: Arm, count: Callable[[Arm], int]) -> str:
    return str(count(arm)) if arm.records else MISSING


def predicted_steps(arm: Arm) -> int:
    """Scheduled steps that ran neither forward nor backward."""
    return sum(record.loss_predicted for record in arm.records)


def folded_moves(arm: Arm) -> int:
    """Real steps that carried a predicted move but consumed no further step."""
    return sum(
        record.mover is not Mover.NONE
        and not record.loss_predicted
        and record.horizon == 0
        and record.action is not RecoveryAction.ROLL_BACK
        for record in arm.records
    )


def rolled_back_steps(arm: Arm) -> int:
    """Steps whose moves were taken back."""
    return sum(record.action is RecoveryAction.ROLL_BACK for record in arm.records)


def summary_rows(comparison: Comparison) -> list[Row]:
    """The summary table; the first row is the heading."""
    arms = comparison.arms
    equal = comparison.equal_loss()

    def row(label: str, show: Callable[[Arm], str]) -> Row:
        return Row(label, tuple(show(arm) for arm in arms))

    rows = [
        row("", lambda arm: arm.name),
        row("scheduled steps", lambda arm: str(arm.scheduled_steps)),
        row(
            "held-out loss at the end (nats/byte)", lambda arm: f"{arm.final.loss:.4f}"
        ),
        row("total cost (real steps)", lambda arm: f"{arm.cost:.1f}"),
        row("training wall time (s)", lambda arm: f"{arm.wall_s:.1f}"),
    ]
    if equal is not None:
        loss = equal.loss

        def at(arm: Arm) -> Evaluation | None:
            if arm is comparison.hybrid:
                return equal.hybrid
            return reach(arm.evaluations, loss)

        rows += [
            row(
                f"cost to reach loss {loss:.4f} (real steps)",
                lambda arm: _point(at(arm), lambda p: f"{p.cost:.1f}"),
            ),
            row(
                f"wall time to reach loss {loss:.4f} (s)",
                lambda arm: _point(at(arm), lambda p: f"{p.wall_s:.1f}"),
            ),
        ]
    return [
        *rows,
        row("backward calls", lambda arm: str(arm.backward_calls)),
        row("forward calls", lambda arm: str(arm.forward_calls)),
        row("training sequences used (real samples)", lambda arm: str(arm.samples)),
        row("predicted steps", lambda arm: _counted(arm, predicted_steps)),
        row("moves inside real steps", lambda arm: _counted(arm, folded_moves)),
        row("rolled-back steps", lambda arm: _counted(arm, rolled_back_steps)),
        row("bookkeeping share of wall time", _share),
        row(
            "bookkeeping per scheduled step (share of a bare step)",
            lambda arm: _per_bare_step(arm, comparison.bare),
        ),
        row("optimizer memory beyond the weights", lambda arm: _bytes(arm.state_bytes)),
    ]


def _share(arm: Arm) -> str:
    share = arm.bookkeeping_share
    return MISSING if share is None else f"{share:.1%}"


def _per_bare_step(arm: Arm, bare: Arm) -> str:
    """Own work per scheduled step in units of what a bare step takes.

    The share of an arm's own time grows as its backwards vanish; this one does not.
    """
    share = arm.bookkeeping_share
    if share is None or not bare.wall_s or not arm.scheduled_steps:
        return MISSING
    own = share * arm.wall_s / arm.scheduled_steps
    return f"{own / (bare.wall_s / bare.scheduled_steps):.1%}"


def seed_rows(comparisons: Sequence[Comparison]) -> list[Row]:
    """One line per seed, then mean and deviation; the first row is a heading."""
    rows = [
        Row("seed", ("bare loss", "hybrid loss", "cost speedup", "wall-time speedup"))
    ]
    columns: list[list[float]] = [[], [], [], []]
    for comparison in comparisons:
        equal = comparison.equal_loss()
        values = [
            comparison.bare.final.loss,
            comparison.hybrid.final.loss,
            math.nan if equal is None else equal.cost_speedup,
            math.nan if equal is None else equal.wall_speedup,
        ]
        for column, value in zip(columns, values, strict=True):
            column.append(value)
        rows.append(Row(str(comparison.seed), tuple(map(_four, values))))
    if len(comparisons) > 1:
        means = tuple(_four(statistics.fmean(column)) for column in columns)
        spreads = tuple(_four(statistics.stdev(column)) for column in columns)
        rows += [Row("mean", means), Row("standard deviation", spreads)]
    return rows


def _four(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def format_table(rows: Sequence[Row]) -> list[str]:
    """Lines of aligned text."""
    label = max(len(row.label) for row in rows)
    widths = [
        max(len(row.cells[column]) for row in rows)
        for column in range(len(rows[0].cells))
    ]
    return [
        "  ".join(
            [
                row.label.ljust(label),
                *(c.rjust(w) for c, w in zip(row.cells, widths, strict=True)),
            ]
        )
        for row in rows
    ]


def describe(comparisons: Sequence[Comparison]) -> list[str]:
    """What prediction did in these runs, in plain sentences."""
    equals = [comparison.equal_loss() for comparison in comparisons]
    known = [equal for equal in equals if equal is not None]
    if len(known) < len(equals):
        return [
            "Cost at equal loss cannot be compared: at least one run never got below "
            "the loss it started from. Nothing was gained or lost that this run could "
            "measure.",
            *_what_happened(comparisons[0].hybrid),
        ]
    lines = [_verdict(known)]
    first, equal = comparisons[0], known[0]
    if first.hybrid.final.loss < first.bare.final.loss:
        lines.append(
            f"The hybrid run ended at a held-out loss of "
            f"{first.hybrid.final.loss:.4f}; the bare run never got that low in its "
            f"{first.bare.scheduled_steps} steps "
            f"(it ended at {first.bare.final.loss:.4f})."
        )
    elif first.hybrid.final.loss > first.bare.final.loss:
        lines.append(
            f"After the same {first.bare.scheduled_steps} steps the hybrid run ended "
            f"at a higher held-out loss: {first.hybrid.final.loss:.4f} against "
            f"{first.bare.final.loss:.4f}."
        )
    lines.append(_wall_time(equal))
    if first.shortened is not None:
        lines.append(_against_shortened(first.hybrid, first.shortened))
    lines += _what_happened(first.hybrid)
    if len(comparisons) < 3:
        lines.append(_caution(first, len(comparisons)))
    return lines


def _caution(comparison: Comparison, seeds: int) -> str:
    """How far a result of one or two seeds can be trusted."""
    bare, hybrid = comparison.bare.final.loss, comparison.hybrid.final.loss
    gap = abs(bare - hybrid) / bare
    runs = "one seed" if seeds == 1 else f"{seeds} seeds"
    text = f"This is {runs}, and the two final losses differ by {gap:.1%}."
    if gap < _SEED_SPREAD:
        return (
            f"{text} Another seed may well change the verdict: late in training a "
            "small difference in loss is a large one in cost. --seeds 5 measures it."
        )
    return f"{text} --seeds 5 measures the spread between seeds."


def _verdict(equals: Sequence[EqualLoss]) -> str:
    """Whether prediction paid, by cost at equal loss."""
    speedup = statistics.fmean(equal.cost_speedup for equal in equals)
    first = equals[0]
    over = "" if len(equals) == 1 else f" (mean over {len(equals)} seeds)"
    facts = (
        f"to reach a held-out loss of {first.loss:.4f} the bare optimizer spent "
        f"{first.bare.cost:.1f} real steps and the hybrid {first.hybrid.cost:.1f}"
    )
    if len(equals) > 1:
        facts = f"for the first seed, {facts}"
    if speedup > 1 + _NOISE:
        return (
            f"Prediction paid: {speedup:.2f}x less cost at equal loss{over}; {facts}."
        )
    if speedup < 1 - _NOISE:
        return (
            f"Prediction did not pay: at equal loss it cost {1 / speedup:.2f}x as much "
            f"as the bare optimizer{over}; {facts}. Without hybridopt this run would "
            "have been cheaper."
        )
    return (
        f"Prediction made no difference that this can measure: {speedup:.2f}x at equal "
        f"loss{over}; {facts}."
    )


def _wall_time(equal: EqualLoss) -> str:
    facts = f"{equal.bare.wall_s:.1f} s bare, {equal.hybrid.wall_s:.1f} s hybrid"
    if equal.wall_speedup < 1:
        return f"In wall time the hybrid run was slower to that loss: {facts}."
    return f"Wall time to that loss: {facts} ({equal.wall_speedup:.2f}x)."


def _against_shortened(hybrid: Arm, shortened: Arm) -> str:
    """Whether a shorter schedule alone explains the gain."""
    facts = (
        f"The bare optimizer with its schedule shortened to the same cost "
        f"({shortened.cost:.1f} real steps) ended at {shortened.final.loss:.4f}, the "
        f"hybrid at {hybrid.final.loss:.4f}"
    )
    if hybrid.final.loss < shortened.final.loss:
        return f"{facts}: a shorter schedule alone does not explain the result."
    return f"{facts}: shortening the schedule would have done at least as well."


def _what_happened(hybrid: Arm) -> list[str]:
    """Counts of the hybrid run."""
    steps = len(hybrid.records)
    predicted, folded = predicted_steps(hybrid), folded_moves(hybrid)
    lines = [
        f"Of {steps} scheduled steps {predicted} were predicted, without batch, "
        f"forward or backward; {folded} real steps carried a predicted move as well; "
        f"{rolled_back_steps(hybrid)} were rolled back. Gradients were taken of "
        f"{hybrid.samples} training sequences: a predicted step uses no data."
    ]
    if not predicted and not folded:
        lines.append("No move was made at all: this was the bare optimizer.")
    share = hybrid.bookkeeping_share
    if share is not None:
        lines.append(f"hybridopt's own work took {share:.1%} of the training time.")
    return lines
