"""Paired blocks keep each side's own times, and both sides do the same work."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks.overhead import Options, Side, _blocks, build, side


def test_blocks_alternate_and_keep_the_sides_apart():
    order: list[str] = []

    def stepper(name: str, wait_s: float) -> Side:
        def step() -> None:
            order.append(name)
            time.sleep(wait_s)

        return Side(nn.Identity(), None, step)

    options = Options(pairs=4, block=2)
    times = _blocks(stepper("bare", 0.001), stepper("wrapped", 0.02), "cpu", options)
    assert [name[0] for name in order] == list("bbwwwwbbbbwwwwbb")
    assert all(bare < wrapped for bare, wrapped in times)


@pytest.mark.parametrize("fixed", [False, True])
def test_both_sides_see_the_same_batches(fixed):
    losses = []
    for _ in range(2):
        _, loss = build("mlp", "cpu", options=Options(1, 1, fixed=fixed))
        losses.append([float(loss().detach()) for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == (1 if fixed else 4)


def test_bare_side_is_plain_adamw():
    options = Options(1, 1)
    bare = side("mlp", "cpu", options=options)
    model, loss = build("mlp", "cpu", options=options)
    twin = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(3):
        bare.step()
        twin.zero_grad()
        loss().backward()
        twin.step()
    pairs = zip(bare.model.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
