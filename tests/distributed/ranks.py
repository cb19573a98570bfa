"""What every rank does; ``test_ranks.py`` compares what came out.

Rank r trains on batch ``world_size * i + r`` in step i. Every scenario returns plain
values and tensors; one that raises returns ``{"error": ...}``.
"""

from __future__ import annotations

import copy
import io
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import Prior, SecantConfig
from hybridopt.distributed import LocalCollective, release_unsharded
from hybridopt.errors import ConfigError
from tests.contract.loops import wrap
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
    return [
        v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for v in values
    ]


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


# -- scenarios -----------------------------------------------------------------------------


def ddp() -> dict[str, Any]:
    task = problem()
    model = DistributedDataParallel(task.model)
    backwards = []

    def counting(_, bucket):
        backwards.append(1)
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, counting)
    opt = wrap(adamw(model.parameters()), model=model)
    sums, original = [], opt.run.collective.sum
    opt.run.collective.sum = lambda v: (sums.append(v.numel()), original(v))[1]
    result = run(task, model, opt)
    counted = opt.statistics()
    return {
        **result,
        "sums": len(sums),
        "real": counted["real_steps"],
        "gradient_reductions": len(backwards),
    }


def ddp_natural() -> dict[str, Any]:
    task = problem()
    model = DistributedDataParallel(task.model)
    return run(task, model, natural(adamw(model.parameters()), model))


def one_process() -> dict[str, Any]:
    """The same training without ranks: the mean of both losses on every rank."""
    task = problem()
    opt = natural(adamw(task.model.parameters()), task.model)
    opt.run.collective, opt.run.settled = LocalCollective(), True
    opt.run.shares = torch.ones_like(opt.run.shares)
    weights, taken = [], []
    for i in range(STEPS):

        def closure(i=i):
            pairs = [task.batches[2 * i + r] for r in range(2)]
            losses = [nn.functional.mse_loss(task.model(x), y) for x, y in pairs]
            return sum(losses) / 2

        opt.step(closure)
        taken.append(decisions(opt))
        weights.append(torch.cat([w.flatten() for w in whole(task.model)]))
    return {"decisions": taken, "weights": torch.stack(weights)}


def ddp_validated() -> dict[str, Any]:
    task = problem(batch_norm=True)
    model = DistributedDataParallel(task.model)
    opt = wrap(adamw(model.parameters()), model=model, validation_interval=1)
    result = run(task, model, opt)
    return {**result, "validated": opt.statistics()["validated_steps"]}


def ddp_nan_on_one_rank() -> dict[str, Any]:
    task = problem()
    model = DistributedDataParallel(task.model)
    opt = wrap(adamw(model.parameters()), model=model)
    taken = []
    for i in range(STEPS):
        spoiled = dist.get_rank() == 1 and i in (2, 9, 14)

        def closure(i=i, spoiled=spoiled):
            loss = loss_of(task, model, i)
            return loss * float("nan") if spoiled else loss

        opt.step(closure)
        taken.append([repr(d) for d in decisions(opt)])
    counted = opt.statistics()
    return {
        "decisions": taken,
        "weights": torch.cat([w.flatten() for w in whole(model)]),
        "bad": counted["skipped_steps"] + counted["rolled_back_steps"],
    }


def ddp_bucket_views() -> dict[str, Any]:
    """Gradients live in DDP's buckets, so each step's are the very same tensors."""
    task = problem()
    model = DistributedDataParallel(task.model, gradient_as_bucket_view=True)
    opt = wrap(adamw(model.parameters()), model=model)
    stubborn = wrapped_steps = 0
    for i in range(STEPS):
        if opt.needs_backward or i > STEPS // 2:
            real = opt.statistics()["real_steps"]
            opt.zero_grad()
            loss_of(task, model, i).backward()
            opt.step()
            stubborn += opt.statistics()["real_steps"] - real
            wrapped_steps += 1
        else:
            opt.step()
    return {
        "stepped": wrapped_steps,
        "real": stubborn,
        "predicted": opt.statistics()["predicted_steps"],
        "weights": torch.cat([w.flatten() for w in whole(model)]),
    }


def ddp_unused_parameter() -> dict[str, Any]:
    task = problem()
    task.model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    model = DistributedDataParallel(task.model, find_unused_parameters=True)
    opt = wrap(adamw(model.parameters()), model=model)
    result = run(task, model, opt)
    spare = task.model.spare
    return {**result, "spare": spare.detach().clone(), "tracked": spare in opt.state}


def fsdp() -> dict[str, Any]:
    task = problem()
    model = sharded(task)
    empty = sum(p.to_local().numel() == 0 for p in model.parameters())
    opt = natural(adamw(model.parameters()), model)
    result = run(task, model, opt)
    kinds = {type(v).__name__ for v in opt.state[next(model.parameters())].values()}
    return {**result, "empty": empty, "kinds": sorted(kinds)}


def fsdp_hybrid_sharding() -> dict[str, Any]:
    task = problem()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = sharded(task, mesh)
    return run(task, model, natural(adamw(model.parameters()), model))


def fsdp_low_precision_directions() -> dict[str, Any]:
    """The budget lies between the two ranks' local sizes; they must agree all the same."""
    task = problem()
    model = sharded(task)
    local = sum(p.to_local().numel() for p in model.parameters())
    sizes = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(sizes, torch.tensor([float(local)]))
    middle = sum(float(s) for s in sizes) / 2
    opt = wrap(
        adamw(model.parameters()), model=model, memory_budget=4 * 4 * middle / 2**20
    )
    result = run(task, model, opt, steps=12)
    dtypes = [str(opt.state[p]["hybrid_step"].dtype) for p in model.parameters()]
    return {**result, "dtypes": dtypes, "sizes": [int(s) for s in sizes]}


def fsdp_refused_by_one_rank() -> dict[str, Any]:
    """All of the second rank's shards are empty, so it alone sees nothing wrong."""
    task = problem(width=1)
    model = sharded(task)
    opt = wrap(adamw(model.parameters()), gain=1e39, model=model)
    result = run(task, model, opt, steps=16)
    rolled_back = opt.statistics()["rolled_back_steps"]
    return {**result, "rolled_back": rolled_back}


def fsdp_zero_gradient_shards() -> dict[str, Any]:
    """User gradients on a predicted step, zero in one rank's shards only."""
    task = problem(width=2)
    model = sharded(task)
    opt = wrap(adamw(model.parameters()), model=model)
    i = 0
    while opt.phase is not Phase.PREDICT:
        opt.step(lambda i=i: loss_of(task, model, i))
        i += 1
    opt.zero_grad()
    loss_of(task, model, i).backward()
    for p in model.parameters():
        if dist.get_rank() == 1:
            p.grad.to_local().zero_()
    real = opt.statistics()["real_steps"]
    opt.step()
    return {"real": opt.statistics()["real_steps"] - real}


def fsdp_resume() -> dict[str, Any]:
    """Through the state-dict API and through a distributed checkpoint on disk."""
    outcome: dict[str, Any] = {}
    for way in ("plain", "flat", "full", "disk"):
        task = problem()
        model = sharded(task)
        opt = wrap(adamw(model.parameters()), model=model)
        for i in range(14):
            opt.step(lambda i=i, t=task, m=model: loss_of(t, m, i))
        while opt.run.controller.plan.position != 1:
            i += 1
            opt.step(lambda i=i, t=task, m=model: loss_of(t, m, i))
        options = StateDictOptions(
            full_state_dict=way == "full",
            flatten_optimizer_state_dict=way == "flat",
            cpu_offload=way == "full",
        )
        saved = get_optimizer_state_dict(model, opt, options=options)
        twin_task = problem()
        twin = sharded(twin_task)
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        other = wrap(adamw(twin.parameters()), model=twin)
        if way == "disk":
            folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(folder)
            path = Path(str(folder[0])) / "checkpoint"
            dcp.save({"opt": saved}, checkpoint_id=path)
            saved = get_optimizer_state_dict(twin, other)
            dcp.load({"opt": saved}, checkpoint_id=path)
        else:
            saved = copy.deepcopy(saved)
        if way == "full":
            everything = [saved if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(everything)
            saved = everything[0]
        set_optimizer_state_dict(twin, other, saved, options=options)
        first = run(task, model, opt, steps=12, start=i + 1)
        second = run(twin_task, twin, other, steps=12, start=i + 1)
        outcome[way] = {
            "decisions": repr(first["decisions"]) == repr(second["decisions"]),
            "weights": torch.equal(first["weights"], second["weights"]),
        }
    return outcome


def fsdp_forward_without_backward() -> dict[str, Any]:
    """The root group stays gathered behind such a forward and hides a weight change."""
    found = {}
    x = torch.ones(4, 6)
    for way in ("nothing", "released", "optimizer"):
        task = problem()
        model = fully_shard(task.model)
        opt = wrap(adamw(model.parameters()), model=model if way == "optimizer" else None)
        i = 0
        while opt.phase is not Phase.PREDICT:
            opt.step(lambda i=i, t=task, m=model: loss_of(t, m, i))
            i += 1
        with torch.no_grad():
            before = model(x)
            if way == "released":
                release_unsharded(model)
            opt.step()
            after = model(x)
        found[way] = bool((before != after).any())
    return found


def zero() -> dict[str, Any]:
    task = problem()
    model = DistributedDataParallel(task.model)

    def build(parameters) -> HybridPredictOptimizer:
        base = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=3e-3)
        return wrap(base)

    opt = build(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)
    try:
        opt.state_dict()
        unconsolidated = "saved"
    except RuntimeError as error:
        unconsolidated = str(error)
    first = {}
    for i in range(14):
        first = run(task, model, opt, steps=1, start=i)
        scheduler.step()
    while opt.run.controller.plan.position != 1:
        i += 1
        run(task, model, opt, steps=1, start=i)
    opt.consolidate_state_dict(to=0)
    buffer = [None]
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        buffer = [file.getvalue()]
    dist.broadcast_object_list(buffer)
    saved = torch.load(io.BytesIO(buffer[0]), weights_only=True)
    indices = {k: sorted(v) for k, v in saved["state"].items()}
    twin_task = problem()
    twin = DistributedDataParallel(twin_task.model)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    other = build(twin.parameters())
    other.load_state_dict(saved)
    unmodified = indices == {k: sorted(v) for k, v in saved["state"].items()}
    left = run(task, model, opt, steps=12, start=i + 1)
    right = run(twin_task, twin, other, steps=12, start=i + 1)
    return {
        **left,
        "unconsolidated": unconsolidated,
        "inner_rate": opt.base.optim.param_groups[0]["lr"],
        "resumes": torch.equal(left["weights"], right["weights"])
        and repr(left["decisions"]) == repr(right["decisions"]),
        "unmodified": unmodified,
        "first": first["weights"],
    }


def zero_the_wrong_way_round() -> dict[str, Any]:
    task = problem()
    model = DistributedDataParallel(task.model)
    opt = ZeroRedundancyOptimizer(model.parameters(), lambda p, **k: wrap(adamw(p)))
    loss_of(task, model, 0).backward()
    try:
        opt.step()
    except ConfigError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def group_created_too_late() -> dict[str, Any]:
    task = problem()
    opt = wrap(adamw(task.model.parameters()))
    opt.run.collective = LocalCollective()  # what it gets before init_process_group
    try:
        opt.step(lambda: loss_of(task, task.model, 0))
    except ConfigError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def groups_of_one() -> dict[str, Any]:
    """Each rank trains a model of its own; only its own group has to agree."""
    groups = [dist.new_group([r]) for r in range(2)]
    task = problem(width=3 + dist.get_rank())
    opt = wrap(
        adamw(task.model.parameters()), process_group=groups[dist.get_rank()]
    )
    result = run(task, task.model, opt, steps=10)
    return {"predicted": result["predicted"]}


SCENARIOS: list[Callable[[], dict[str, Any]]] = [
    ddp,
    ddp_natural,
    one_process,
    ddp_validated,
    ddp_nan_on_one_rank,
    ddp_bucket_views,
    ddp_unused_parameter,
    fsdp,
    fsdp_hybrid_sharding,
    fsdp_low_precision_directions,
    fsdp_refused_by_one_rank,
    fsdp_zero_gradient_shards,
    fsdp_resume,
    fsdp_forward_without_backward,
    zero,
    zero_the_wrong_way_round,
    group_created_too_late,
    groups_of_one,
]


def main(rank: int) -> dict[str, Any]:
    """Results by scenario."""
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        torch.manual_seed(0)
        try:
            results[scenario.__name__] = scenario()
        except Exception:
            results[scenario.__name__] = {"error": traceback.format_exc()}
        print(rank, scenario.__name__, flush=True)
        dist.barrier()
    return results
