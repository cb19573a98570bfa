"""The lag while steps are slept through: the EMA itself, where that is precise."""

import copy

import pytest
import torch

from hybridopt.config import DriftConfig
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.types import Extent
from hybridopt.weights.buckets import Bucket
from hybridopt.weights.lag import INTERVAL_STEPS, DozingLag
from tests.problems import assert_same_bits, regression, train
from tests.weights.test_coasting import K, coasting, train_until

BETA = 0.9
LAG = 0.9 / 0.1
"""Steady lag in steps."""


def _bucket(dtype=torch.float32, basis=None):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(200, generator=generator).to(dtype)
    kind = basis or dtype
    return Bucket(
        tracked=True,
        parameters=[theta.clone()],
        anchors=[theta.clone()],
        steps=[torch.zeros(200, dtype=kind)],
        lags=[(0.01 * torch.randn(200, generator=generator)).to(kind)],
        windows=[(0.01 * torch.randn(200, generator=generator)).to(kind)],
        drifts=[torch.zeros(200, dtype=kind)],
    )


def _doze(lag, bucket, ways):
    for way in ways:
        bucket.parameters[0] += way
        lag.steps += 1
        if lag.due:
            lag.catch_up([bucket], TorchOps())


@pytest.mark.parametrize("steps", [1, 5, 8, 13, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_velocity_keeps_its_steady_lag_and_the_window_its_pace(steps, dtype):
    bucket, lag = _bucket(dtype), DozingLag(BETA)
    lag.windows = True
    velocity = 0.01 * torch.ones(200, dtype=dtype)
    bucket.lags[0].copy_(LAG * velocity)
    window = bucket.windows[0].clone()
    _doze(lag, bucket, [velocity] * steps)
    torch.testing.assert_close(lag.now(bucket)[0], LAG * velocity)
    lag.wake([bucket], TorchOps())
    torch.testing.assert_close(bucket.lags[0], LAG * velocity)
    torch.testing.assert_close(bucket.windows[0], window + steps * velocity)
    assert_same_bits(bucket.anchors, bucket.parameters)
    assert not lag.dozes


def test_one_step_at_a_time_is_the_filter_itself():
    bucket, lag = _bucket(torch.float64), DozingLag(BETA)
    generator = torch.Generator().manual_seed(1)
    expected = bucket.lags[0].clone()
    for _ in range(20):
        way = 0.01 * torch.randn(200, generator=generator, dtype=torch.float64)
        bucket.parameters[0] += way
        lag.steps = 1
        lag.catch_up([bucket], TorchOps())
        expected = BETA * (expected + way)
    torch.testing.assert_close(lag.now(bucket)[0], expected)


def test_what_is_seen_asleep_is_what_wakes_up():
    for steps in range(1, 2 * INTERVAL_STEPS):
        bucket, lag = _bucket(), DozingLag(BETA)
        generator = torch.Generator().manual_seed(steps)
        _doze(lag, bucket, 0.01 * torch.randn(steps, 200, generator=generator))
        seen = lag.now(bucket)[0]
        lag.wake([bucket], TorchOps())
        torch.testing.assert_close(seen, bucket.lags[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_less_precision_keeps_the_lag_and_not_the_weights(dtype, basis):
    bucket, lag = _bucket(dtype, basis), DozingLag(BETA)
    lag.windows = True
    # From zero in steps that bf16 weights can make.
    bucket.parameters[0].zero_()
    bucket.anchors[0].zero_()
    velocity = 2.0**-7 * torch.ones(200, dtype=dtype)
    bucket.lags[0].copy_(LAG * velocity)
    _doze(lag, bucket, [velocity] * (2 * INTERVAL_STEPS))
    torch.testing.assert_close(
        bucket.lags[0].float(), (LAG * velocity).float(), rtol=0.05, atol=0.0
    )
    assert not lag.averages
    lag.wake([bucket], TorchOps())
    assert_same_bits(bucket.anchors, bucket.parameters)


def _asleep():
    problem = regression()
    opt = coasting(problem)
    start = train_until(problem, opt, Extent.DRIFT)
    while not opt.run.space.state_dict()["averages"]:
        train(problem, opt, 1, start=start)
        start += 1
    return problem, opt, start


@pytest.mark.parametrize(
    "changed",
    [
        {"memory_budget": 1e-9},
        {"drift": DriftConfig(window_steps=K, minimum=0.3, memory_budget=0.0)},
    ],
    ids=["less precise", "no drift"],
)
@pytest.mark.parametrize("back", [False, True], ids=["loaded", "and back"])
def test_loading_with_another_budget_never_takes_an_average_for_a_lag(changed, back):
    problem, opt, start = _asleep()
    state = copy.deepcopy(opt.state_dict())
    settings = [changed, {}] if back else [changed]
    for overrides in settings:
        twin = problem.twin()
        other = coasting(twin, **overrides)
        other.load_state_dict(state)
        state = copy.deepcopy(other.state_dict())
    before = twin.weights()
    with other.evaluation_weights(1.0):
        for inside, weight in zip(twin.weights(), before, strict=True):
            assert float((inside - weight).norm()) < 0.2 * float(weight.norm())
    losses = train(twin, other, 60, start=start)
    reference = train(problem, opt, 60, start=start)
    assert max(losses) < 1.5 * max(reference)
