"""BatchNorm statistics for weights that no batch has been through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["recalibrated"]

BATCHES = 16


@contextlib.contextmanager
def recalibrated(task: Any) -> Iterator[None]:
    """Inside: statistics of the current weights, the mean over the next ``BATCHES``
    training batches. On exit: those of before, bit for bit.

    Averaged weights (EMA, Lookahead, Schedule-Free) would be judged with another
    network's statistics without it, as their authors warn. Does nothing without
    BatchNorm. Costs nothing on any clock: a gift to the arms that need it.
    """
    layers = [m for m in task.model.modules() if isinstance(m, _BatchNorm)]
    if not layers or not hasattr(task, "batch"):
        yield
        return
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in layers]
    rates = [m.momentum for m in layers]
    training = task.model.training
    task.model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    with torch.no_grad():
        for i in range(BATCHES):
            task.loss(task.batch(task.index + i))
    task.model.train(training)
    try:
        yield
    finally:
        for layer, state, rate in zip(layers, kept, rates, strict=True):
            layer.momentum = rate
            for key, value in layer.state_dict().items():
                value.copy_(state[key])
