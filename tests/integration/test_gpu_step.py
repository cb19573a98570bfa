"""Whole steps on a real card: no wait, no NaN, the very weights back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import (
    DriftConfig,
    FixedHorizon,
    GainConfig,
    LeadConfig,
    Prior,
    SecantConfig,
)
from hybridopt.errors import RecoveryAction
from hybridopt.run import Components
from tests.parts import FixedPredictor, watch_unseen
from tests.problems import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-4, fused=True),
    "sgd": lambda p: torch.optim.SGD(
        p, lr=1e-3, momentum=0.9, weight_decay=1e-3, fused=True
    ),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Trained:
    """A small model on the card, with a batch per step."""

    def __init__(self, name="adamw", horizon=None, dtype=torch.float32, **overrides):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))
        self.model.to("cuda", dtype)
        self.x = torch.randn(64, 128, 64, device="cuda", dtype=dtype)
        self.y = torch.randn(64, 128, 8, device="cuda", dtype=dtype)
        parts = Components()
        if horizon is not None:
            parts = Components(predictor=FixedPredictor(0.5, 50.0))
            overrides |= {"max_predict_steps": horizon, "bandit": FixedHorizon()}
        self.opt = HybridPredictOptimizer(
            BASES[name](list(self.model.parameters())),
            model=self.model,
            components=parts,
            **{"predictor": Prior(), "warmup_steps": 4, **overrides},
        )

    def loss(self, i, factor=1.0):
        value = nn.functional.mse_loss(self.model(self.x[i % 64]), self.y[i % 64])
        return value * factor

    def run(self, steps, start=0, factors=None):
        for i in range(start, start + steps):
            factor = (factors or {}).get(i, 1.0)
            self.opt.step(lambda i=i, f=factor: self.loss(i, f))

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def base_state(self):
        return [
            v.clone()
            for s in self.opt.base.state.values()
            for k, v in s.items()
            if isinstance(v, torch.Tensor) and not k.startswith("hybrid")
        ]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("memory", ["default", "low"])
def test_real_steps_wait_for_nothing(name, memory):
    made = Trained(name, max_predict_steps=0, memory=memory)
    made.run(40)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.run(10, start=40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        torch.profiler.ProfilerActivity.CUDA,
    ]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("steps"):
            made.run(10, start=50)
        torch.cuda.synchronize()
    events = profile.events()
    end = next(e.time_range.end for e in events if e.name == "steps")
    found = [e.name for e in events if e.name in WAITS and e.time_range.start < end]
    assert found == []
    assert made.opt.statistics()["folded_moves"] > 10


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("when", [0, 1, 5, 12, 13])
def test_bad_loss_at_any_time_changes_nothing(name, memory, when):
    made = Trained(name, max_predict_steps=0, memory=memory)
    made.run(when)
    before, state = made.weights(), made.base_state()
    made.run(1, start=when, factors={when: math.nan})
    assert_same_bits(before, made.weights())
    if when:
        assert_same_bits(state, made.base_state())
    assert made.opt.last_step.action is RecoveryAction.SKIP_STEP
    made.run(10, start=when + 1)
    assert all(bool(w.isfinite().all()) for w in made.weights())
    assert made.opt.statistics()["skipped_steps"] == 1


@pytest.mark.parametrize("memory", ["default", "low"])
def test_rollback_gives_the_very_weights_back(memory):
    made = Trained(horizon=3, memory=memory)
    step = 0
    while made.opt.phase is not Phase.PREDICT or step < 12:
        made.run(1, start=step)
        step += 1
    before, state = made.weights(), made.base_state()
    while made.opt.phase is Phase.PREDICT:
        made.run(1, start=step)
        step += 1
    assert any(
        not torch.equal(a, b) for a, b in zip(before, made.weights(), strict=True)
    )
    made.run(1, start=step, factors={step: math.inf})
    assert made.opt.last_step.action is RecoveryAction.ROLL_BACK
    assert_same_bits(before, made.weights())
    assert_same_bits(state, made.base_state())


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("steps", [9, 23, 24, 25, 26])
def test_resume_equals_uninterrupted(memory, steps, tmp_path):
    made = Trained(horizon=2 if steps > 9 else 0, memory=memory)
    made.run(steps)
    torch.save(made.opt.state_dict(), tmp_path / "opt.pt")
    other = Trained(horizon=2 if steps > 9 else 0, memory=memory)
    other.model.load_state_dict(copy.deepcopy(made.model.state_dict()))
    state = torch.load(tmp_path / "opt.pt", weights_only=True)
    other.opt.load_state_dict(state)
    for one in (made, other):
        one.run(20, start=steps)
    assert_same_bits(made.weights(), other.weights())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("steps", [12, 40, 41])
def test_resume_with_secant_moves_equals_uninterrupted(fused, steps, tmp_path):
    runs = []
    for _ in range(2):
        made = Trained()
        made.x[1:], made.y[1:] = made.x[:1], made.y[:1]  # one batch, no noise
        base = torch.optim.Adam(made.model.parameters(), lr=1e-3, fused=fused)
        secant = SecantConfig(warmup_steps=8)
        made.opt = HybridPredictOptimizer(
            base, model=made.model, predictor=Prior(), warmup_steps=4, secant=secant
        )
        runs.append(made)
    made, other = runs
    made.run(steps)
    torch.save(made.opt.state_dict(), tmp_path / "opt.pt")
    other.model.load_state_dict(copy.deepcopy(made.model.state_dict()))
    other.opt.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for one in (made, other):
        one.run(30, start=steps)
    assert made.opt.statistics()["secant_moves"] > 0
    assert_same_bits(made.weights(), other.weights())


ALONE = {
    "lead": LeadConfig(on_gpu=True),
    "gain": GainConfig(rate=0.0, initial=0.0, minimum=0.0),
    "drift": DriftConfig(enabled=False),
    "secant": SecantConfig(enabled=False),
    "max_predict_steps": 0,
}
"""Nothing but the lead moves weights."""


def _ahead(name):
    """A run that is ahead of its base, with 2 steps of lead from now on."""
    trained = Trained(name, **ALONE)
    trained.run(20)
    lead = trained.opt.run.lead
    lead.length.learn = lambda statistics: None
    lead.length.value = 2.0
    trained.run(10, 20)
    assert lead.made == 2.0
    return trained


@pytest.mark.parametrize("name", list(BASES))
def test_step_skipped_on_the_device_leaves_weights_and_lead(name):
    trained = _ahead(name)
    before = trained.weights()
    trained.run(1, 30, {30: math.nan})
    assert_same_bits(trained.weights(), before)
    twin = _ahead(name)
    for each in (trained, twin):
        each.opt.run.lead.length.value = 0.0
        each.run(1, 31)
        assert each.opt.run.lead.made == 0.0
    for a, b in zip(trained.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(BASES))
def test_resume_while_ahead_on_the_device_equals_uninterrupted(name):
    trained = Trained(name, **ALONE)
    trained.run(20)
    trained.opt.run.lead.length.value = 2.0
    trained.run(11, 20)
    assert trained.opt.run.lead.made > 0.0
    state = copy.deepcopy(trained.opt.state_dict())
    weights = copy.deepcopy(trained.model.state_dict())
    trained.run(20, 31)
    other = Trained(name, **ALONE)
    other.model.load_state_dict(weights)
    other.opt.load_state_dict(state)
    other.run(20, 31)
    assert_same_bits(trained.weights(), other.weights())
    assert trained.opt.statistics()["lead"] == other.opt.statistics()["lead"]


def test_no_lead_on_the_device_where_it_is_not_wanted():
    trained = Trained(lead=LeadConfig(on_gpu=False))
    trained.run(60)
    assert trained.opt.statistics()["lead"] == 0.0
    state = trained.opt.state[next(trained.model.parameters())]
    assert "hybrid_lead" not in state


SLEEPY = {**ALONE, "lead": LeadConfig(enabled=False)}
"""Nothing moves weights but the base, so the optimizer soon sleeps."""


FORMATS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", list(BASES))
@pytest.mark.parametrize("dtype", FORMATS)
def test_sleeping_steps_pass_unseen_and_wait_for_nothing(name, dtype, monkeypatch):
    unseen = watch_unseen(monkeypatch)
    trained = Trained(name, dtype=dtype, **SLEEPY)
    trained.run(60)
    assert len(unseen) > 20
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.run(40, 60)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(unseen) > 50
    assert trained.opt.statistics()["real_steps"] == 100


@pytest.mark.parametrize("name", list(BASES))
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_step_is_skipped_unseen_on_the_device(name, dtype, bad, monkeypatch):
    unseen = watch_unseen(monkeypatch)
    trained = Trained(name, dtype=dtype, **SLEEPY)
    step = 60
    trained.run(step)
    while unseen[-1] != step - 1:
        trained.run(1, step)
        step += 1
    weights, state = trained.weights(), trained.base_state()
    trained.run(1, step, {step: bad})
    assert unseen[-1] == step
    assert_same_bits(weights, trained.weights())
    assert_same_bits(state, trained.base_state())
    assert trained.opt.last_step.action is RecoveryAction.SKIP_STEP
    trained.run(40, step + 1)
    assert trained.opt.statistics()["skipped_steps"] == 1
