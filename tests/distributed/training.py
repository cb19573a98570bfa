"""Training on one rank, and what is recorded of it.

Rank r trains on batch ``2 i + r`` in step i.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hybridopt import HybridPredictOptimizer
from hybridopt.config import Prior, SecantConfig
from tests.problems import Problem

STEPS = 40


def problem(width: int = 5, batch_norm: bool = False) -> Problem:
    """Rows that two ranks cannot share evenly; the last bias is one element, so that
    the second rank's shard of it is empty."""
    g = torch.Generator().manual_seed(5)
    norm = [nn.BatchNorm1d(width)] if batch_norm else []
    model = nn.Sequential(nn.Linear(6, width), *norm, nn.Tanh(), nn.Linear(width, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    truth = torch.randn(6, 1, generator=g)
    data = []
    for _ in range(2 * STEPS + 40):
        x = torch.randn(16, 6, generator=g)
        data.append((x, torch.sin(x @ truth) + 0.1 * torch.randn(16, 1, generator=g)))
    return Problem(model, data)


def whole(model: nn.Module) -> list[torch.Tensor]:
    """Full copies of all parameters."""
    values = [p.detach() for p in model.parameters()]
    return [v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for v in values]


def loss_of(task: Problem, model: nn.Module, step: int) -> torch.Tensor:
    x, y = task.batches[(2 * step + dist.get_rank()) % len(task.batches)]
    return nn.functional.mse_loss(model(x), y)


def decisions(opt: HybridPredictOptimizer) -> list[Any]:
    last = opt.last_step
    return [
        last.phase.value,
        last.horizon,
        last.arm,
        int(last.verdict),
        last.action.value,
        last.loss,
        last.gradient_norm,
    ]


def run(task: Problem, model: nn.Module, opt, steps=STEPS, start=0) -> dict[str, Any]:
    """Forward-closure loop; decisions of every step and the weights behind it."""
    taken, weights = [], []
    for i in range(start, start + steps):
        opt.step(lambda i=i: loss_of(task, model, i))
        taken.append(decisions(opt))
        weights.append(torch.cat([w.flatten() for w in whole(model)]))
    return {
        "decisions": taken,
        "weights": torch.stack(weights),
        "predicted": opt.statistics()["predicted_steps"],
    }


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def natural(base, model) -> HybridPredictOptimizer:
    """As a user builds it, but for a shorter warm-up and a cheap predictor."""
    return HybridPredictOptimizer(
        base,
        model=model,
        warmup_steps=4,
        predictor=Prior(),
        secant=SecantConfig(enabled=False),
    )


def sharded(task: Problem, mesh=None) -> nn.Module:
    for layer in task.model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(task.model, mesh=mesh)
