"""Keeping a nested optimizer's step out of the process-wide optimizer hooks.

Profilers and memory trackers register global hooks and expect one call per training
step; the wrapped base would fire them a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch.optim import Optimizer

__all__ = ["plain_step", "without_global_hooks"]


_NOTHING = nullcontext()


def without_global_hooks() -> AbstractContextManager[None]:
    """No global step hook fires inside; the registries are as before on exit.

    The hooks of the base itself still fire: whoever put them there wants base steps.
    """
    registries = _registries()
    return _emptied(registries) if any(registries) else _NOTHING


def plain_step(base: Optimizer) -> Callable[[], Any]:
    """The base's step for a caller inside a step of its own, which has been announced.

    ``Optimizer`` wraps every step in a profiler's range and two rounds of hooks. Where
    nobody listens to either, the step inside is the same, and on a CPU the wrapping
    takes longer than a small step's arithmetic.
    """
    step = base.step
    function = getattr(step, "__func__", None)
    heard = (
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or any(_registries())
        or torch._C._autograd._profiler_enabled()
    )
    # What was put on the instance, or is not as torch wraps it, is called as it is.
    wrapped = getattr(function, "hooked", False) and function is type(base).step
    inner = getattr(function, "__wrapped__", None)
    if heard or not wrapped or inner is None:
        return step
    return partial(inner, base)


def _registries() -> list[dict[int, Any]]:
    return [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]


@contextmanager
def _emptied(registries: list[dict[int, Any]]) -> Iterator[None]:
    kept = [dict(r) for r in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, kept, strict=True):
            registry.update(hooks)
