"""The average of recent gradients that the base keeps for itself, where it keeps one.

Its product with a direction says at once what a product per gradient would say one by
one: so the drift can be measured at one step in a few, and nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from hybridopt.protocols import Ops
from hybridopt.weights.buckets import Bucket
from hybridopt.weights.local import local

__all__ = ["along_drift", "averaged_gradients", "gradient_memory"]

_BY_BETA = (Adam, AdamW, NAdam, RAdam, Adamax)
"""m <- beta1 m + (1 - beta1) g under ``exp_avg``."""
SHORTEST, LONGEST = 0.8, 0.95
"""Memory of an average that spans the steps between two measurements, and is over well
before a window is: gradients older than the direction would measure it in its own
making."""


def gradient_memory(base: Optimizer) -> float:
    """Memory of the average of gradients that the base keeps of every tensor, as its
    groups say: the longest of theirs; 0 where some group keeps none that serves.
    """
    if isinstance(base, _BY_BETA):
        memories = [float(group["betas"][0]) for group in base.param_groups]
    elif isinstance(base, SGD):
        memories = [float(group["momentum"]) for group in base.param_groups]
    else:
        return 0.0
    if any(group.get("maximize") for group in base.param_groups):
        return 0.0
    serve = all([SHORTEST <= memory <= LONGEST for memory in memories])
    return max(memories, default=0.0) if serve else 0.0


def averaged_gradients(
    base: Optimizer, parameters: Sequence[Tensor], alike: Sequence[Tensor]
) -> list[Tensor] | None:
    """The averages of these parameters, in the units of a gradient.

    Args:
        base: One of which ``gradient_memory`` is positive.
        parameters: Whose averages.
        alike: Tensors on this rank whose shapes and device they have to have.

    Returns:
        None if one of them is missing or elsewhere.
    """
    key = "momentum_buffer" if isinstance(base, SGD) else "exp_avg"
    found: list[Tensor] = []
    for parameter, like in zip(parameters, alike, strict=True):
        held: dict[str, Any] = base.state.get(parameter, {})
        average = held.get(key)
        if not isinstance(average, Tensor):
            return None
        average = local(average)
        if average.device != like.device or average.numel() != like.numel():
            return None
        found.append(average if average.dim() == like.dim() else average.reshape(-1))
    if isinstance(base, SGD):
        return list(torch._foreach_mul(found, _weights(base, parameters)))
    return found


def along_drift(base: Optimizer, ops: Ops, bucket: Bucket) -> Tensor:
    """(rows, 3) on the device: ||g||^2, <g, d> and ||d||^2 of a bucket with gradients;
    in the second, g is its average where the base keeps one.
    """
    drift, square = [bucket.drifts], [bucket.drift_sq]
    averages = None
    if gradient_memory(base):
        averages = averaged_gradients(base, bucket.sources, bucket.parameters)
    if averages is None:
        return ops.observe(bucket.gradients, drift, square)
    norms = ops.observe(bucket.gradients, [])
    products = ops.observe(averages, drift, square)
    return torch.cat([norms, products[:, 1:]], 1)


def _weights(base: SGD, parameters: Sequence[Tensor]) -> list[float]:
    """What makes an average of SGD's sum: b <- momentum b + (1 - dampening) g."""
    weights = {
        id(p): (1.0 - float(g["momentum"])) / (1.0 - float(g["dampening"]))
        for g in base.param_groups
        for p in g["params"]
    }
    return [weights[id(p)] for p in parameters]
