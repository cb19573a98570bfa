"""The overhead figures as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["markdown"]


def markdown(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Tables of time, waits and memory, under the facts that they rest on."""
    facts = [f"- {key}: {meta[key]}" for key in ("hardware", "commit", "date")]
    facts.append(f"- command: `{meta['command']}`")
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    facts.append(f"- {versions}")
    parts = [
        "# Whole-wrapper overhead\n",
        "\n".join(facts),
        "\nPaired alternating blocks of real steps; ratio = median [quartiles] of "
        "wrapped over bare.\nPredicted steps are forced by a scripted predictor "
        "(`benchmarks/overhead_sides.py`) and timed with the\ndevice synchronized "
        "around each.\n",
        _times(rows),
        "\nWaits: calls in which the host waits for the GPU, and blocking copies to "
        "pageable memory, in a profile.\nA cycle is one real step and four forced "
        "predicted ones.\n",
        _waits(rows),
    ]
    if any(row["memory"] for row in rows):
        parts += [
            "\nDevice memory beyond the bare base's, in copies of the weights (eager, "
            "the size's own batch,\n`torch.cuda.max_memory_allocated`; requested: at "
            "the peak, before the allocator rounds up).\n",
            _memory(rows),
        ]
    return "\n".join(parts) + "\n"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _times(rows: list[dict[str, Any]]) -> str:
    head = [
        "model",
        "weights",
        "tokens per step",
        "step, bare",
        "step, wrapped",
        "ratio",
        "own host time",
        "predicted step (forced)",
    ]
    body = []
    for r in rows:
        low, high = r["ratio_quartiles"]
        body.append(
            [
                r["model"],
                f"{r['parameters'] / 1e6:.1f}M",
                str(r["tokens"]) if r["tokens"] else "",
                f"{1e3 * r['bare_s']:.2f} ms",
                f"{1e3 * r['wrapped_s']:.2f} ms",
                f"{r['ratio']:.4f} [{low:.4f}, {high:.4f}]",
                f"{1e3 * r['host_s']:.2f} ms",
                f"{1e3 * r['predicted_s']:.2f} ms",
            ]
        )
    return _table(head, body)


def _waits(rows: list[dict[str, Any]]) -> str:
    head = ["model", "bare, per step", "wrapped, per real step", "per forced cycle"]
    body = [
        [
            r["model"],
            *(
                f"{r[side]['waits']:.1f} + {r[side]['pageable']:.1f}"
                for side in ("bare_waits", "wrapped_waits", "forced_waits")
            ),
        ]
        for r in rows
    ]
    return _table(head, body)


def _memory(rows: list[dict[str, Any]]) -> str:
    kinds, figures = ("default", "low"), ("steady", "peak", "requested")
    head = ["model", *(f"{kind}: {what}" for kind in kinds for what in figures)]
    body = []
    for r in rows:
        if not r["memory"]:
            continue
        bare = r["memory"]["bare"]
        cells = [
            f"{(r['memory'][kind][what] - bare[what]) / r['weights']:+.2f}"
            for kind in kinds
            for what in figures
        ]
        body.append([r["model"], *cells])
    return _table(head, body)
