"""Trainings drawn at random: any configuration, base, schedule, loop and mishap."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import (
    MLP,
    RSSM,
    DivergenceConfig,
    DriftConfig,
    FixedHorizon,
    GainConfig,
    LeadConfig,
    Linear,
    LinUCB,
    Prior,
    ResidualConfig,
    SecantConfig,
)
from tests.problems import BASES, Problem, regression

FUSED: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adam_fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "adamw_slow_fused": lambda p: torch.optim.AdamW(p, lr=2e-4, fused=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
}
LOOPS = ("forward", "classic", "none", "mixed")
GRADIENT_MISHAPS = ("nan gradient", "inf gradient", "no gradient", "zero gradients")
OTHER_MISHAPS = ("nan loss", "jump", "statistics", "state_dict", "evaluation")


@dataclass
class Setup:
    """One training, repeatable from its seed."""

    seed: int
    device: str = "cpu"
    base: str = ""
    loop: str = ""
    dtype: torch.dtype = torch.float32
    steps: int = 0
    saved: int = 0
    """Steps before the checkpoint."""
    with_model: bool = False
    mishaps: dict[int, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rate: Callable[[int], float] = lambda step: 1.0

    def problem(self) -> Problem:
        """The model and batches before the first step."""
        draw = random.Random(self.seed + 1)
        problem = regression(
            self.seed % 7,
            batches=draw.choice([1, 4, 400]),
            batch_norm=draw.random() < 0.3,
            noise=draw.choice([0.0, 0.3]),
        )
        problem.model.to(self.device, self.dtype)
        problem.batches = [
            (x.to(self.device, self.dtype), y.to(self.device, self.dtype))
            for x, y in problem.batches
        ]
        return problem

    @cached_property
    def learning_rate(self) -> float:
        """The base's own, before any schedule."""
        anything = [torch.nn.Parameter(torch.zeros(1))]
        rate: float = {**BASES, **FUSED}[self.base](anything).defaults["lr"]
        return rate

    def build(self, problem: Problem) -> HybridPredictOptimizer:
        """The optimizer that the setup asks for."""
        make = {**BASES, **FUSED}[self.base]
        model = problem.model if self.with_model else None
        return HybridPredictOptimizer(
            make(list(problem.model.parameters())), model=model, **self.config
        )


def drawn(seed: int, device: str = "cpu") -> Setup:
    """The setup of a seed."""
    draw = random.Random(seed)
    names = sorted(BASES if device == "cpu" else [*BASES, *FUSED, *FUSED])
    setup = Setup(seed, device, base=draw.choice(names), loop=draw.choice(LOOPS))
    setup.dtype = draw.choice([torch.float32] * 6 + [torch.float64, torch.bfloat16])
    if setup.dtype is torch.float64 and setup.base == "nadam":
        # Torch casts its float32 ``mu_product`` at a load: not exact by itself.
        setup.base = "adam"
    setup.config = _config(draw)
    if setup.config.get("validation_interval") and setup.loop == "mixed":
        setup.loop = "forward"  # validations want closures of one form
    setup.steps = draw.choice([60, 120, 240])
    setup.saved = draw.randrange(1, setup.steps)
    setup.with_model = draw.random() < 0.7
    setup.rate = _rate(draw, setup.steps)
    if draw.random() < 0.5:
        kinds = OTHER_MISHAPS
        if setup.loop != "forward":
            kinds = OTHER_MISHAPS + GRADIENT_MISHAPS
        for _ in range(draw.randint(1, 6)):
            setup.mishaps[draw.randrange(setup.steps)] = draw.choice(kinds)
    return setup


def take_step(
    setup: Setup, problem: Problem, opt: HybridPredictOptimizer, step: int
) -> float | None:
    """The ``step``-th step of a setup's training, whatever comes in between."""
    for group in opt.param_groups:
        group["lr"] = setup.learning_rate * setup.rate(step)
    mishap = setup.mishaps.get(step, "")
    _look(opt, mishap)

    def loss() -> torch.Tensor:
        factor = {"jump": 10.0, "nan loss": math.nan}.get(mishap, 1.0)
        return problem.loss(step) * factor

    def backward() -> torch.Tensor:
        opt.zero_grad()
        value = loss()
        value.backward()
        _spoil(problem, mishap)
        return value

    loops = ("forward", "classic", "none")
    loop = loops[step * 7919 % 3] if setup.loop == "mixed" else setup.loop
    if loop == "forward":
        result = opt.step(loss)
    elif loop == "classic":
        result = opt.step(backward)
    else:
        if opt.needs_backward:
            backward()
        result = opt.step()
    return None if result is None else float(result)


def _look(opt: HybridPredictOptimizer, mishap: str) -> None:
    """What users ask at any time, and what must change nothing."""
    if mishap == "statistics":
        opt.statistics(), opt.last_step, repr(opt)
    elif mishap == "state_dict":
        opt.state_dict()
    elif mishap == "evaluation":
        with opt.evaluation_weights():
            assert opt.param_groups


def _spoil(problem: Problem, mishap: str) -> None:
    first, *_, last = problem.model.parameters()
    if mishap == "nan gradient":
        _own(first)[:1] = math.nan
    elif mishap == "inf gradient":
        _own(last)[:1] = math.inf
    elif mishap == "no gradient":
        first.grad = None
    elif mishap == "zero gradients":
        for p in problem.model.parameters():
            p.grad.zero_()


def _own(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's share of the gradient, which may be empty, as a view."""
    gradient: Any = parameter.grad
    return getattr(gradient, "_local_tensor", gradient).view(-1)


def _rate(draw: random.Random, steps: int) -> Callable[[int], float]:
    """A schedule: constant, rising, falling, both, with a jump, with zeros, a saw."""
    length, jump = draw.randint(2, 40), draw.choice([0.1, 3.0])

    def rise(step: int) -> float:
        return min(1.0, (step + 1) / length)

    def fall(step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))

    schedules: list[Callable[[int], float]] = [
        lambda step: 1.0,
        rise,
        fall,
        lambda step: rise(step) * fall(step),
        lambda step: 1.0 if step < 3 * length else jump,
        lambda step: 0.0 if step % 37 == 0 else 1.0,
        lambda step: 1.0 - (step % length) / (2 * length),
    ]
    return draw.choice(schedules)


def _config(draw: random.Random) -> dict[str, Any]:
    """Fields of ``HybridConfig``, each changed in two setups of five."""
    pick = draw.choice
    fields: dict[str, Callable[[], Any]] = {
        "memory": lambda: pick(["default", "low"]),
        "memory_budget": lambda: pick([0.0, 1e-6, 1.0]),
        "warmup_steps": lambda: pick([0, 1, 2, 5, 30]),
        "full_steps": lambda: pick([1, 2, 3]),
        "max_predict_steps": lambda: pick([0, 1, 4, 64]),
        "confidence_threshold": lambda: pick([0.0, 0.1, 0.9, 1.0]),
        "validation_interval": lambda: pick([0, 1, 3]),
        "gain": lambda: GainConfig(
            rate=pick([0.0, 0.25, 1.0]),
            initial=pick([0.0, 0.1, 1.0]),
            minimum=pick([0.0, 0.02]),
            maximum=pick([16.0, 128.0]),
            boost=pick([0.0, 1.0]),
            eager=pick([0.0, 1.0]),
            relaxation=pick([0.0, 0.03, 1.0]),
        ),
        "drift": lambda: DriftConfig(
            enabled=draw.random() < 0.7,
            window_steps=pick([2, 5, 12, 40]),
            minimum=pick([0.0, 0.02, 0.3]),
            initial=pick([0.0, 0.25]),
            hold=pick([0.0, 2.0, 4.0]),
            memory_budget=pick([0.0, 1024.0]),
            beta=pick([0.5, 0.97]),
        ),
        "lead": lambda: LeadConfig(
            enabled=draw.random() < 0.7,
            memory_budget=pick([0.0, 1024.0]),
            maximum=pick([0.0, 4.0]),
        ),
        "secant": lambda: SecantConfig(
            enabled=draw.random() < 0.6,
            pairs=pick([1, 3, 100]),
            warmup_steps=pick([1, 5, 20]),
            noise_threshold=pick([0.08, 10.0]),
        ),
        "predictor": lambda: pick(
            [
                Prior(),
                Linear(),
                MLP(train_interval_steps=2),
                RSSM(
                    train_interval_steps=4,
                    sequence_steps=4,
                    batch_size=4,
                    hidden_size=8,
                ),
            ]
        ),
        "bandit": lambda: pick([FixedHorizon(), LinUCB()]),
        "residual": lambda: ResidualConfig(
            enabled=True, capacity=pick([1, 4, 64]), rank=pick([0, 2])
        ),
        "divergence": lambda: DivergenceConfig(
            check_interval_steps=pick([1, 3]),
            max_rollbacks=pick([1, 3]),
            window_steps=pick([4, 50]),
            loss_sigma_threshold=pick([0.5, 4.0]),
            pause_steps=pick([1, 200]),
            gradient_norm_multiplier=pick([1.1, 10.0]),
        ),
        "collect_metrics": lambda: True,
        "clip_grad_norm": lambda: pick([0.1, 1.0]),
    }
    return {name: make() for name, make in fields.items() if draw.random() < 0.4}
