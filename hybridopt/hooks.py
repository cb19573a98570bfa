"""Keeping a nested optimizer's step out of the process-wide optimizer hooks.

Profilers and memory trackers register global hooks and expect one call per training
step; the wrapped base would fire them a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.optim.optimizer as torch_optimizer

__all__ = ["without_global_hooks"]


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """No global step hook fires inside; the registries are as before on exit.

    The hooks of the base itself still fire: whoever put them there wants base steps.
    """
    registries: list[dict[int, Any]] = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    kept = [dict(r) for r in registries]
    if not any(kept):
        yield
        return
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, kept, strict=True):
            registry.update(hooks)
