"""A self-contained HTML page about a comparison, or about one recorded run.

Nothing is loaded from anywhere: styles and pictures are in the page. All text is
escaped. Every number was measured in the runs that the page is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hybridopt.errors import ConfigError
from hybridopt.telemetry import plots
from hybridopt.telemetry.comparison import Arm, Comparison, Provenance
from hybridopt.telemetry.narrative import Row, describe, seed_rows, summary_rows
from hybridopt.telemetry.picture import draw
from hybridopt.types import Level, Phase, StepRecord

__all__ = ["comparison_report", "metrics_report", "write_report"]

_MAX_EVENTS = 200
_STYLE = """
:root { color-scheme: light dark; --line: #8a8f9855; --soft: #8a8f9818; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin-top: 2.2rem; font-size: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line);
  text-align: right; }
th:first-child, td:first-child { text-align: left; }
table.text td, table.text th { text-align: left; vertical-align: top; }
.scroll { overflow-x: auto; } .lead { font-size: 1.1rem; font-weight: 600; }
.summary { background: var(--soft); border-left: 4px solid #2f7fdb;
  padding: .6rem 1rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption { font-size: .9rem; opacity: .85; }
code, pre { font: .9em ui-monospace, monospace; background: var(--soft); }
pre { padding: .6rem; overflow-x: auto; } code { padding: .1rem .25rem; }
"""


def comparison_report(comparisons: Sequence[Comparison], origin: Provenance) -> str:
    """The page about bare and hybrid runs; pictures show the first seed.

    Raises:
        HybridError: matplotlib is not installed.
    """
    first = comparisons[0]
    sentences = describe(comparisons)
    seeds = f", seed {first.seed}" if len(comparisons) > 1 else ""
    parts = [
        '<div class="summary"><p class="lead">'
        + escape(sentences[0])
        + "</p>"
        + "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences[1:])
        + "</div>",
        f"<h2>Numbers{escape(seeds)}</h2>" + _table(summary_rows(first)),
        "<p>Cost counts a forward as 1/3 and a backward as 2/3 of a real step, "
        "validations of the hybrid run included. Wall time leaves out the held-out "
        "evaluations. Costs at equal loss are interpolated between evaluations, never "
        "extrapolated: a bare run counts from where it first got there, the hybrid run "
        "from where it got there for good.</p>",
        "<h2>The runs</h2>" + _descriptions(first.arms),
        *(f"<p>{escape(note)}</p>" for note in origin.notes),
    ]
    if len(comparisons) > 1:
        parts.append("<h2>All seeds</h2>" + _table(seed_rows(comparisons)))
    parts += [
        "<h2>Loss against cost</h2>",
        _figure(
            lambda axes: plots.plot_loss_by_cost(axes, first),
            "Held-out loss against cost in real steps, one line per run.",
        ),
        "<h2>Loss against steps</h2>",
        _figure(
            lambda axes: plots.plot_loss_by_step(axes, first),
            "Loss against scheduled steps. Dots: held-out loss; thin lines: running "
            "mean of the mini-batch losses. Shading: share of the hybrid run's steps "
            "in each phase; unshaded is Full.",
        ),
        *_hybrid_sections(first.hybrid.records),
        *_gain_section(first.hybrid),
        *_statistics_section(first.hybrid.statistics),
    ]
    return _page(origin, parts)


def metrics_report(records: Sequence[StepRecord], origin: Provenance) -> str:
    """The page about one recorded run; it compares with nothing.

    Raises:
        ConfigError: No records.
        HybridError: matplotlib is not installed.
    """
    if not records:
        raise ConfigError(
            "metrics: no step records. Train with HybridConfig.metrics_path set and "
            "call close() at the end."
        )
    parts = [
        '<div class="summary"><p>One recorded run. A metrics file holds no bare run to '
        "compare with, so this page says nothing about speed.</p></div>",
        "<h2>Numbers</h2>" + _table(_count_rows(records)),
        "<h2>Loss</h2>",
        _figure(
            lambda axes: plots.plot_records(axes, records),
            "Measured loss against scheduled steps, phases shaded; unshaded is Full.",
        ),
        *_hybrid_sections(records),
        "<h2>Gain and learning rate</h2>",
        _figure(
            lambda axes: plots.plot_mean_gain(axes, records),
            "Mean gain over tensors (solid) and learning rate (dashed) by step.",
        ),
    ]
    return _page(origin, parts)


def write_report(path: str | Path, page: str) -> Path:
    """Write a page; returns where it is.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path.resolve()


# -- sections --------------------------------------------------------------------------


def _hybrid_sections(records: Sequence[StepRecord]) -> list[str]:
    """Forecasts, horizons and alarms of one hybrid run."""
    parts = ["<h2>Predicted against measured loss</h2>"]
    pairs = plots.forecast_pairs(records)
    if pairs:
        error = sum(abs(e - m) / abs(m) for e, m in pairs if m) / len(pairs)
        parts.append(
            _figure(
                lambda axes: plots.plot_forecasts(axes, records),
                f"Loss expected at the end of each Predict phase against the loss of "
                f"the next measured batch; {len(pairs)} phases, mean absolute error "
                f"{error:.1%}. Dashed: equal. Single batches are noisy.",
                size=(6, 5),
            )
        )
    else:
        parts.append("<p>No predicted step was followed by a measurement.</p>")
    parts += [
        "<h2>Horizons chosen</h2>",
        _figure(
            lambda axes: plots.plot_horizons(axes, records),
            "Predicted steps that follow each real step; 0: none.",
            size=(9, 3),
        ),
        "<h2>Monitor events</h2>",
        _events(records),
    ]
    return parts


def _events(records: Sequence[StepRecord]) -> str:
    alarms = [
        record
        for record in records
        if record.verdict is not Level.OK or record.action.value == "roll_back"
    ]
    if not alarms:
        return "<p>The divergence monitor raised no alarm.</p>"
    rows = [
        Row("step", ("phase", "level", "action", "worst signal")),
        *(
            Row(
                str(record.step),
                (
                    record.phase.value,
                    record.verdict.name.lower(),
                    record.action.value.replace("_", " "),
                    record.reason,
                ),
            )
            for record in alarms[:_MAX_EVENTS]
        ),
    ]
    note = f"<p>Steps not judged ok: {len(alarms)}.</p>"
    if len(alarms) > _MAX_EVENTS:
        note += f"<p>The first {_MAX_EVENTS} are shown.</p>"
    return note + _table(rows, text=True)


def _gain_section(hybrid: Arm) -> list[str]:
    heading = "<h2>Gains per tensor</h2>"
    history = hybrid.gains
    if history is None or len(history.steps) < 2:
        return [heading, "<p>No gains were recorded: hardly any move was made.</p>"]
    tensors = len(history.names)
    return [
        heading,
        _figure(
            lambda axes: plots.plot_gains(axes, history),
            "Gain of the planned move per parameter tensor over time: how many times "
            "the last real step's displacement is added.",
            size=(9, max(3.0, 0.16 * tensors + 1)),
        ),
    ]


def _statistics_section(statistics: Mapping[str, Any]) -> list[str]:
    if not statistics:
        return []
    rows = [Row("name", ("value",))]
    for name, value in statistics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        rows.append(Row(name, (shown,)))
    return [
        "<details><summary>What the optimizer counted itself "
        "(statistics())</summary>" + _table(rows, text=True) + "</details>"
    ]


def _count_rows(records: Sequence[StepRecord]) -> list[Row]:
    real = [r for r in records if not r.loss_predicted]
    rows = [
        Row("", ("value",)),
        Row("steps recorded", (str(len(records)),)),
        Row("steps with a measured loss", (str(len(real)),)),
        Row("predicted steps", (str(len(records) - len(real)),)),
    ]
    for phase in Phase:
        count = sum(record.phase is phase for record in records)
        rows.append(Row(f"steps in phase {phase.value}", (str(count),)))
    rolled_back = sum(record.action.value == "roll_back" for record in records)
    rows.append(Row("rolled-back steps", (str(rolled_back),)))
    if real:
        rows.append(Row("last measured loss", (f"{real[-1].loss:.4f}",)))
    spent = sum(record.bookkeeping_s for record in records)
    rows.append(Row("bookkeeping time (s)", (f"{spent:.2f}",)))
    return rows


def _descriptions(arms: Sequence[Arm]) -> str:
    rows = [Row("run", ("what it is",))]
    rows += [Row(arm.name, (arm.description,)) for arm in arms]
    return _table(rows, text=True)


# -- html ------------------------------------------------------------------------------


def _figure(
    fill: Callable[[Any], None], caption: str, size: tuple[float, float] = (9, 4)
) -> str:
    picture = draw(fill, label=caption, size=size)
    return (
        f'<figure style="max-width: {size[0] * 6.5:.0f}rem">{picture}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(rows: Sequence[Row], *, text: bool = False) -> str:
    """An HTML table; the first row is its heading."""

    def line(row: Row, tag: str) -> str:
        cells = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row.cells)
        return f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>'

    kind = ' class="text"' if text else ""
    body = "".join(line(row, "td") for row in rows[1:])
    return (
        f'<div class="scroll"><table{kind}><thead>{line(rows[0], "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _page(origin: Provenance, parts: Sequence[str]) -> str:
    facts = {
        "made": origin.created,
        "hardware": origin.hardware,
        **{name: version for name, version in origin.versions.items()},
        **origin.settings,
    }
    rows = [Row("what", ("value",)), *(Row(k, (v,)) for k, v in facts.items())]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(origin.title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(origin.title)}</h1>\n"
        + "\n".join(parts)
        + "\n<h2>How to repeat it</h2>"
        + f"<pre>{escape(origin.command)}</pre>"
        + _table(rows, text=True)
        + "</body></html>\n"
    )
