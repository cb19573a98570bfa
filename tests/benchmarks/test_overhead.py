"""Paired blocks keep each side's own times, and both sides do the same work."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch import nn

from benchmarks.overhead import HORIZON, Options, _blocks, _predicted, main
from benchmarks.overhead_sides import Model, Side, build, forced, parse, side

MLP = Model("mlp")


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
        _, loss = build(MLP, "cpu", fixed=fixed)
        losses.append([float(loss().detach()) for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == (1 if fixed else 4)


def test_bare_side_is_plain_adamw():
    bare = side(MLP, "cpu")
    model, loss = build(MLP, "cpu")
    twin = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(3):
        bare.step()
        twin.zero_grad()
        loss().backward()
        twin.step()
    pairs = zip(bare.model.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_micro_batches_add_up_on_both_sides():
    from benchmarks.overhead_sides import hybrid

    model = parse("mlp:8x3")
    sides = [side(model, "cpu"), side(model, "cpu", wrap=hybrid(warmup_steps=99))]
    for one in sides:
        for _ in range(4):
            one.step()
    left, right = (list(one.model.parameters()) for one in sides)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert sides[1].optimizer.statistics()["backward_calls"] == 4


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("mlp", Model("mlp")),
        ("gpt2:64x4:compile", Model("gpt2", 64, 4, True)),
        ("5m:32", Model("5m", 32)),
        ("5m:compile", Model("5m", None, 1, True)),
    ],
)
def test_models_are_read_and_written_alike(text, model):
    assert parse(text) == model
    assert str(model) == text


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="gpt3"):
        parse("gpt3")


def test_forced_copy_makes_the_predicted_steps_it_is_timed_for():
    one = side(MLP, "cpu", wrap=forced(HORIZON))
    found = _predicted(one, "cpu", cycles=3)
    assert len(found) == 3 * HORIZON
    statistics = one.optimizer.statistics()
    assert statistics["predicted_steps"] >= 3 * HORIZON
    assert statistics["rolled_back_steps"] == 0


def test_figures_are_written_with_their_provenance(tmp_path):
    words = ["--models", "mlp", "--pairs", "2", "--block", "2", "--warm", "12"]
    assert main([*words, "--memory", "--fused", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "overhead.json").read_text())
    (row,) = saved["models"]
    assert row["bare_s"] > 0.0
    assert row["predicted_steps"] == 2 * HORIZON
    assert math.isnan(row["wrapped_waits"]["waits"])
    memory = row["memory"]
    assert memory["default"]["steady"] > memory["low"]["steady"]
    assert memory["low"]["steady"] > memory["bare"]["steady"]
    text = (tmp_path / "overhead.md").read_text()
    assert "| mlp |" in text
    assert saved["meta"]["commit"] in text
