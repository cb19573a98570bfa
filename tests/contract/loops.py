"""An optimizer whose phases come on cue, and loops that drive it there."""

from __future__ import annotations

import torch

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import FixedHorizon, SecantConfig
from hybridopt.run import Components
from tests.parts import FixedPredictor
from tests.problems import BASES, Problem, assert_same_bits, train

WARMUP_STEPS = 3
HORIZON = 2
"""Behind every real step after warm-up come this many predicted ones."""


def components(gain: float = 0.25) -> Components:
    # So much claimed progress that only ``max_predict_steps`` bounds the horizon.
    return Components(predictor=FixedPredictor(gain, 50.0))


def wrap(base: torch.optim.Optimizer, gain: float = 0.25, **overrides):
    settings = {
        "warmup_steps": WARMUP_STEPS,
        "max_predict_steps": HORIZON,
        "bandit": FixedHorizon(),
        "secant": SecantConfig(enabled=False),
        **overrides,
    }
    return HybridPredictOptimizer(base, components=components(gain), **settings)


def build(problem: Problem, name: str = "adamw", **overrides):
    return wrap(BASES[name](list(problem.model.parameters())), **overrides)


def drive(problem: Problem, opt, phase: Phase, position: int = 0) -> int:
    """Step until the next step is of ``phase``; returns how many steps it took."""
    for i in range(60):
        plan = opt.run.controller.plan
        if plan.phase is phase and (
            phase is not Phase.PREDICT or plan.position == position
        ):
            return i
        opt.step(lambda i=i: problem.loss(i))
    raise AssertionError(f"{phase} never came")


def backward(problem: Problem, opt, index: int) -> torch.Tensor:
    """The classic loop's part before ``step()``."""
    opt.zero_grad()
    loss = problem.loss(index)
    loss.backward()
    return loss


def loaded(problem, opt, state, load, **build_settings):
    """A fresh twin with the same weights that took in ``state`` through ``load``."""
    twin = problem.twin()
    other = build(twin, **build_settings)
    load(twin, other, state)
    return twin, other


def assert_continues_alike(problem, opt, twin, other, start):
    assert other.phase is opt.phase
    assert train(problem, opt, 15, start=start) == train(twin, other, 15, start=start)
    assert_same_bits(problem.weights(), twin.weights())
