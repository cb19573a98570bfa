"""Totals and rates of a run, and a speedup estimate that says how it was made."""

from __future__ import annotations

from typing import Any

from hybridopt.run import Counters, Run

__all__ = ["SPEEDUP_BASIS", "summarize"]

FORWARD_COST = 1.0 / 3.0
"""Cost of a forward pass in real steps (a backward is 2/3)."""

SPEEDUP_BASIS = (
    "scheduled steps over cost in real steps (forward 1/3, backward 2/3), assuming "
    "that predicted steps made the progress they consumed; not a measured speedup"
)


def summarize(run: Run) -> dict[str, Any]:
    """Everything counted so far.

    Returns:
        ``steps`` (calls that advanced training), ``real_steps``, ``predicted_steps``,
        ``validated_steps``, ``folded_moves`` and ``secant_moves`` (moves inside real
        steps), ``rolled_back_steps``, ``skipped_steps``, ``closure_calls``,
        ``backward_calls``; ``backward_reduction`` in [0, 1]; ``closure_s``, ``base_s``,
        ``bookkeeping_s`` and ``bookkeeping_share`` of the three together;
        ``held_rate`` (how many times as long as scheduled the last base step was made);
        ``lead`` (base steps by which the weights are ahead of its trajectory);
        ``predictor_error`` (running relative error of the expected loss);
        ``extra_bytes`` on the device; ``kernels``; ``estimated_speedup`` with
        ``speedup_basis``.

        A real step whose numbers have not been taken in yet counts as made; if the base
        skipped it, that shows one real step later.
    """
    counters = run.counters
    values: dict[str, Any] = {
        key: getattr(counters, key) for key in Counters.__dataclass_fields__
    }
    steps = counters.steps
    spent = counters.closure_s + counters.base_s + counters.bookkeeping_s
    cost = counters.backward_calls + FORWARD_COST * counters.validated_steps
    values["backward_reduction"] = (
        1.0 - counters.backward_calls / steps if steps else 0.0
    )
    values["bookkeeping_share"] = counters.bookkeeping_s / spent if spent else 0.0
    values["held_rate"] = run.hold.factor
    values["lead"] = run.lead.made
    values["predictor_error"] = run.predictor_error.mean
    values["extra_bytes"] = run.space.extra_bytes()
    values["kernels"] = run.space.ops.name
    values["estimated_speedup"] = steps / cost if cost else 1.0
    values["speedup_basis"] = SPEEDUP_BASIS
    return values
