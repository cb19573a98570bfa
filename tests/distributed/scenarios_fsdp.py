"""Scenarios of sharded parameters: FSDP2."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hybridopt import Phase
from hybridopt.distributed import release_unsharded
from tests.contract.loops import wrap
from tests.distributed.training import (
    adamw,
    loss_of,
    natural,
    problem,
    run,
    sharded,
)


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
    """The budget lies between the ranks' local sizes; they must agree all the same."""
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
        opt = wrap(
            adamw(model.parameters()), model=model if way == "optimizer" else None
        )
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
