"""Scenarios of replicated parameters: DDP, ZeRO, and process groups."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from hybridopt import HybridPredictOptimizer
from hybridopt.distributed import LocalCollective
from hybridopt.errors import ConfigError
from tests.contract.loops import wrap
from tests.distributed.training import (
    STEPS,
    adamw,
    decisions,
    loss_of,
    natural,
    problem,
    run,
    whole,
)


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
    opt = wrap(adamw(task.model.parameters()), process_group=groups[dist.get_rank()])
    result = run(task, task.model, opt, steps=10)
    return {"predicted": result["predicted"]}
