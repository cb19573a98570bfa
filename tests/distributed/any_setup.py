"""Drawn setups (``tests/setups.py``) on replicated and sharded weights; what goes wrong
goes wrong on one rank only.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hybridopt import HybridPredictOptimizer
from tests.distributed.training import sharded, whole
from tests.problems import BASES, Problem
from tests.setups import Setup, drawn, take_step

FIRST, LAST = map(int, os.environ.get("HYBRIDOPT_RANK_SETUPS", "0-12").split("-"))
KINDS = ("replicated", "sharded")
STEPS = 70
SHARDED_BASES = ("adam", "adamw", "adamw_slow", "rmsprop", "sgd", "sgd_momentum")


class _OwnBatches(Problem):
    """Every rank has its own; a forward goes through the parallel model."""

    def __init__(self, problem: Problem, parallel: nn.Module) -> None:
        super().__init__(problem.model, problem.batches)
        self.parallel = parallel

    def loss(self, index: int) -> torch.Tensor:
        own = (2 * index + dist.get_rank()) % len(self.batches)
        x, y = self.batches[own]
        return nn.functional.mse_loss(self.parallel(x), y)


def _drawn(seed: int, shards: bool) -> Setup:
    setup = drawn(seed)
    if shards:
        setup.dtype = torch.float32
        setup.base = SHARDED_BASES[seed % len(SHARDED_BASES)]
    if dist.get_rank() != seed % 2:
        setup.mishaps = {}
    # Every rank runs backward or none does: DDP and FSDP wait for each other in it.
    kept = ("nan loss", "jump", "nan gradient", "inf gradient", "statistics")
    setup.mishaps = {k: v for k, v in setup.mishaps.items() if v in kept}
    return setup


def _train(seed: int, shards: bool) -> dict[str, Any]:
    setup = _drawn(seed, shards)
    problem = setup.problem()
    if shards:
        parallel = sharded(problem)
    else:
        parallel = DistributedDataParallel(problem.model)
    make = BASES[setup.base]
    opt = HybridPredictOptimizer(
        make(list(problem.model.parameters())),
        model=parallel if setup.with_model else None,
        **setup.config,
    )
    task = _OwnBatches(problem, parallel)
    taken, weights = [], []
    for step in range(STEPS):
        take_step(setup, task, opt, step)
        last = opt.last_step
        taken.append([last.phase.value, last.horizon, last.action.value, last.loss])
        weights.append(torch.cat([w.flatten() for w in whole(problem.model)]))
    return {"decisions": taken, "weights": torch.stack(weights), "setup": repr(setup)}


def main(rank: int) -> dict[str, Any]:
    """Results by seed and kind; an exception ends it, and the launch with it."""
    results = {}
    for seed in range(FIRST, LAST):
        for kind in KINDS:
            results[f"{kind} {seed}"] = _train(seed, kind == "sharded")
            print(rank, kind, seed, flush=True)
    return results
