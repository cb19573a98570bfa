import math

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.demo.model import ByteGPT
from hybridopt.demo.text import text_at
from hybridopt.demo.train import RunPlan, Task, TrainingRun, tensor_bytes
from hybridopt.telemetry import read_metrics
from hybridopt.telemetry.live import RunProgress
from tests.demo.micro import MICRO


@pytest.fixture
def task(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"The quick brown fox jumps over the lazy dog, again.\n" * 2000)
    return Task(MICRO, text_at(text), 3, torch.device("cpu"), 1e-3, 0.0)


@pytest.fixture
def weights():
    return ByteGPT(MICRO.model).initialize(0).state_dict()


def train(plan, task, weights, pieces=4):
    run = TrainingRun(plan, task, weights)
    progress = RunProgress(plan.name, plan.steps)
    run.evaluate()
    while not run.done:
        run.advance(math.ceil(plan.steps / pieces), progress, lambda _: None)
        run.evaluate()
    return run, run.finish(), progress


def test_batches_depend_on_seed_and_index_only(task):
    torch.manual_seed(0)
    inputs, targets = task.batch(5)
    torch.manual_seed(1)
    again, _ = task.batch(5)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.shape == (2, 16)
    assert not torch.equal(inputs, task.batch(6)[0])


def test_bare_run_is_plain_adamw_with_linear_decay(task, weights):
    run, arm, _ = train(RunPlan("bare", "", 10), task, weights)
    model = ByteGPT(MICRO.model)
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (10 - step) / 10
        optimizer.zero_grad()
        model.loss(*task.batch(step)).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.weights()[name])
    assert arm.backward_calls == arm.forward_calls == 10
    assert arm.cost == pytest.approx(10.0)
    assert arm.samples == 20
    assert arm.state_bytes == tensor_bytes(optimizer.state.values())


def test_hybrid_run_counts_what_the_optimizer_really_called(task, weights, tmp_path):
    path = tmp_path / "m.jsonl"
    plan = RunPlan("hybrid", "", 40, hybrid=True, metrics_path=path)
    run, arm, progress = train(plan, task, weights)
    assert isinstance(run.optimizer, HybridPredictOptimizer)
    assert len(arm.records) == 40
    assert arm.backward_calls == arm.statistics["backward_calls"]
    assert arm.forward_calls == arm.statistics["closure_calls"]
    assert len(arm.training) == arm.backward_calls
    assert arm.samples == 2 * arm.backward_calls
    assert progress.predicted_steps == arm.statistics["predicted_steps"]
    assert [r.step for r in read_metrics(path)] == list(range(40))
    held = tensor_bytes(run.optimizer.state.values())
    assert arm.state_bytes == held > arm.statistics["extra_bytes"] > 0
    assert 0 < arm.bookkeeping_share < 1


def test_hybrid_run_starts_as_the_bare_run(task, weights):
    _, bare, _ = train(RunPlan("bare", "", 40), task, weights)
    _, hybrid, _ = train(RunPlan("hybrid", "", 40, hybrid=True), task, weights)
    assert bare.evaluations[0].loss == hybrid.evaluations[0].loss
    warm = [point.loss for point in bare.training[:8]]
    assert [point.loss for point in hybrid.training[:8]] == warm


def test_evaluation_is_off_the_clock_and_off_the_budget(task, weights):
    run = TrainingRun(RunPlan("bare", "", 4), task, weights)
    losses = {run.evaluate() for _ in range(3)}
    assert len(losses) == 1
    assert run.cost == 0
    run.advance(4, RunProgress("bare", 4), lambda _: None)
    run.evaluate()
    arm = run.finish()
    assert arm.final.wall_s == arm.wall_s
    assert arm.final.cost == pytest.approx(4.0)
    assert arm.evaluations[2].wall_s == 0


def test_steps_do_not_touch_the_global_generator(task, weights):
    run = TrainingRun(RunPlan("hybrid", "", 40, hybrid=True), task, weights)
    before = torch.get_rng_state()
    run.advance(40, RunProgress("hybrid", 40), lambda _: None)
    assert torch.equal(before, torch.get_rng_state())
