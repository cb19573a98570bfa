"""Scenarios of gradients taken ahead of the weights, on replicas and on shards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from hybridopt import HybridPredictOptimizer, leading
from hybridopt.config import DriftConfig, GainConfig, Prior, SecantConfig
from hybridopt.distributed import LocalCollective
from tests.distributed.training import STEPS, problem, run, sharded, whole


@contextmanager
def _looking_often() -> Iterator[None]:
    """Where the lead alone moves weights, the optimizer soon sleeps."""
    usual = leading.ASLEEP_INTERVAL_STEPS
    leading.ASLEEP_INTERVAL_STEPS = leading.INTERVAL_STEPS
    try:
        yield
    finally:
        leading.ASLEEP_INTERVAL_STEPS = usual


def _ahead(model: nn.Module) -> HybridPredictOptimizer:
    """Nothing but the lead moves weights, at a rate at which the base overshoots."""
    return HybridPredictOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.05),
        model=model,
        warmup_steps=4,
        predictor=Prior(),
        gain=GainConfig(rate=0.0, initial=0.0, minimum=0.0),
        drift=DriftConfig(enabled=False),
        secant=SecantConfig(enabled=False),
        max_predict_steps=0,
    )


def _recorded(task, model: nn.Module, opt: HybridPredictOptimizer) -> dict[str, Any]:
    sums, original = [], opt.run.collective.sum
    opt.run.collective.sum = lambda v: (sums.append(v.numel()), original(v))[1]
    leads, parts = [], []
    for i in range(STEPS):
        parts.append(run(task, model, opt, steps=1, start=i))
        leads.append((opt.run.lead.length.value, opt.run.lead.made))
    return {
        "decisions": [d for part in parts for d in part["decisions"]],
        "weights": torch.cat([part["weights"] for part in parts]),
        "leads": leads,
        "sums": len(sums),
        "real": opt.statistics()["real_steps"],
    }


def ddp_ahead() -> dict[str, Any]:
    task = problem()
    model = DistributedDataParallel(task.model)
    with _looking_often():
        return _recorded(task, model, _ahead(model))


def fsdp_ahead() -> dict[str, Any]:
    task = problem()
    model = sharded(task)
    with _looking_often():
        return _recorded(task, model, _ahead(model))


def one_process_ahead() -> dict[str, Any]:
    """The same training without ranks: the mean of both losses on every rank."""
    task = problem()
    opt = _ahead(task.model)
    opt.run.collective, opt.run.settled = LocalCollective(), True
    opt.run.shares = torch.ones_like(opt.run.shares)
    weights, leads = [], []

    def loss(i: int) -> torch.Tensor:
        pairs = [task.batches[2 * i + r] for r in range(2)]
        return sum(nn.functional.mse_loss(task.model(x), y) for x, y in pairs) / 2

    with _looking_often():
        for i in range(STEPS):
            opt.step(lambda i=i: loss(i))
            leads.append((opt.run.lead.length.value, opt.run.lead.made))
            weights.append(torch.cat([w.flatten() for w in whole(task.model)]))
    return {"weights": torch.stack(weights), "leads": leads}


def fsdp_ahead_resume() -> dict[str, Any]:
    """Saved at five steps in a row, whatever was measured and not yet added up."""
    task = problem()
    model = sharded(task)
    opt = _ahead(model)
    saved, weights, trail, unshared = {}, {}, {}, 0
    with _looking_often():
        run(task, model, opt, steps=20)
        for i in range(20, 36):
            if i < 25:
                unshared += opt.run.lead.unshared is not None
                saved[i] = copy.deepcopy(get_optimizer_state_dict(model, opt))
                weights[i] = [p.detach().clone() for p in model.parameters()]
            trail[i] = run(task, model, opt, steps=1, start=i)["weights"][0]
        same = []
        for i, state in saved.items():
            twin_task = problem()
            twin = sharded(twin_task)
            with torch.no_grad():
                for p, q in zip(twin.parameters(), weights[i], strict=True):
                    p.copy_(q)
            other = _ahead(twin)
            set_optimizer_state_dict(twin, other, state)
            again = run(twin_task, twin, other, steps=36 - i, start=i)["weights"]
            same.append(all(torch.equal(w, trail[i + k]) for k, w in enumerate(again)))
    return {"same": same, "unshared": unshared, "lead": opt.run.lead.made}
