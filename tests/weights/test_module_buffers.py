"""Buffers of a module, listed as the module would."""

import torch
from torch import nn

from hybridopt.weights.module_buffers import list_buffers


def test_buffers_come_in_the_order_of_the_model_each_once():
    shared = nn.BatchNorm1d(3)
    inner = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), shared)
    model = nn.ModuleDict({"b": inner, "a": shared, "c": nn.BatchNorm1d(4)})
    model.register_buffer("own", torch.ones(2))
    model.register_buffer("none", None)
    inner[1].register_buffer("again", model.own)
    model["c"].register_buffer("scratch", torch.zeros(1), persistent=False)
    ours, want = list_buffers(model), list(model.buffers())
    assert len(ours) == len(want) == 11
    assert all(a is b for a, b in zip(ours, want, strict=True))
