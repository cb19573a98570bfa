"""Calling what is not ours inside a step, the user's closure and the base, and
counting the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hybridopt.closure import (
    Closure,
    Evaluation,
    call_as_is,
    evaluate,
    insists_on_call,
)
from hybridopt.hooks import plain_step, without_global_hooks
from hybridopt.run import Run

__all__ = ["bare_step", "base_step", "call_framework", "run_closure"]


def run_closure(run: Run, closure: Closure) -> Evaluation:
    """Call the user's closure, of either form, and leave gradients in ``p.grad``.

    Raises:
        ClosureError: No gradients, and nothing to call backward on.
    """
    started = time.perf_counter()
    parameters = run.space.parameters()
    result = evaluate(closure, parameters, run.config.clip_grad_norm)
    run.counters.closure_s += time.perf_counter() - started
    run.counters.closure_calls += 1
    run.counters.backward_calls += 1
    return result


def call_framework(run: Run, closure: Closure) -> Evaluation:
    """Call a closure that its framework wants called on every step."""
    started = time.perf_counter()
    evaluation = call_as_is(closure)
    run.counters.closure_s += time.perf_counter() - started
    run.counters.closure_calls += 1
    return evaluation


def base_step(
    run: Run, closure: Closure | None, evaluation: Evaluation | None
) -> Callable[[], Any]:
    """The base's step; bases that insist on a closure get one that replays."""
    base = run.base
    if not run.replays or closure is None:
        return plain_step(base)
    first = [True]

    def replay() -> Any:
        if first[0] and evaluation is not None:
            first[0] = False
            return evaluation.loss
        return run_closure(run, closure).loss

    return lambda: base.step(replay)


def bare_step(run: Run, closure: Closure | None) -> Any:
    """The base alone, with either closure form; returns the closure's result."""
    run.space.refresh()
    if closure is None:
        with without_global_hooks():
            return run.base.step()
    if insists_on_call(closure):
        evaluation = call_as_is(closure)
    else:
        clip = run.config.clip_grad_norm
        evaluation = evaluate(closure, run.space.parameters(), clip)
    with without_global_hooks():
        base_step(run, closure, evaluation)()
    return evaluation.result
