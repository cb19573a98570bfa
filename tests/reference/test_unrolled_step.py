"""The optimizer against a literal twin, every iterate written out."""

import pytest
import torch
from torch import nn

from hybridopt import HybridPredictOptimizer, Phase
from hybridopt.config import DriftConfig, FixedHorizon, SecantConfig
from hybridopt.control.controller import IDLE_STEPS
from hybridopt.run import Components
from tests.parts import FixedPredictor
from tests.problems import assert_same_bits


def _quadratic(dtype=torch.float64):
    # Powers of two keep every product exact, so that bits can be compared.
    return nn.Parameter(torch.tensor([4.0, -2.0, 1.0], dtype=dtype))


def _optimizer(weight, predictor, **overrides):
    return HybridPredictOptimizer(
        torch.optim.SGD([weight], lr=0.25),
        components=Components(predictor=predictor),
        secant=SecantConfig(enabled=False),
        drift=DriftConfig(enabled=False),
        **{"warmup_steps": 1, **overrides},
    )


def test_folded_moves_follow_the_formula():
    weight = _quadratic()
    opt = _optimizer(weight, FixedPredictor(gain=0.5, progress=0.5))
    twin = weight.detach().clone()
    for step in range(12):
        opt.step(lambda: 0.5 * (weight**2).sum())
        displacement = -0.25 * twin
        twin = twin + displacement
        # The first real step only observes; moves begin when there is a displacement
        # to continue, behind the second.
        if step >= 1:
            twin = twin + 0.5 * displacement
        assert_same_bits([weight.detach()], [twin])
    assert opt.statistics()["folded_moves"] == 11


def test_horizon_consumes_steps_and_makes_the_whole_move():
    weight = _quadratic()
    opt = _optimizer(
        weight,
        FixedPredictor(gain=2.0, progress=60.0),
        max_predict_steps=2,
        bandit=FixedHorizon(),  # the bandit would learn that the claim is too high
    )
    phases = []
    for _ in range(12):
        phases.append(opt.phase)
        opt.step(lambda: 0.5 * (weight**2).sum())
    assert phases[0] is Phase.WARMUP
    first = phases.index(Phase.PREDICT)
    assert phases[first : first + 6] == [
        Phase.PREDICT,
        Phase.PREDICT,
        Phase.CORRECT,
        Phase.PREDICT,
        Phase.PREDICT,
        Phase.CORRECT,
    ]
    assert opt.statistics()["backward_calls"] == sum(
        p is not Phase.PREDICT for p in phases
    )


def test_two_shares_of_a_move_equal_the_unrolled_sum():
    weight = _quadratic()
    opt = _optimizer(
        weight, FixedPredictor(gain=2.0, progress=60.0), max_predict_steps=2
    )
    while opt.phase is not Phase.PREDICT:
        opt.step(lambda: 0.5 * (weight**2).sum())
    step = opt.state[weight]["hybrid_step"].clone()
    twin = weight.detach().clone()
    for _ in range(2):
        opt.step(lambda: 0.5 * (weight**2).sum())
        twin = twin + 0.5 * 2.0 * step
        assert_same_bits([weight.detach()], [twin])


def test_predicted_move_scales_with_the_learning_rate():
    weight = _quadratic()
    opt = _optimizer(
        weight, FixedPredictor(gain=2.0, progress=60.0), max_predict_steps=2
    )
    while opt.phase is not Phase.PREDICT:
        opt.step(lambda: 0.5 * (weight**2).sum())
    step, twin = opt.state[weight]["hybrid_step"].clone(), weight.detach().clone()
    opt.param_groups[0]["lr"] = 0.125
    opt.step()
    assert_same_bits([weight.detach()], [twin + 0.5 * 2.0 * 0.5 * step])


def test_no_move_is_made_while_the_scheduler_still_raises_the_rate():
    weight = _quadratic()
    opt = _optimizer(weight, FixedPredictor(gain=1.0, progress=0.5))
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.125, 1.0, total_iters=20)
    moved_at = None
    for step in range(40):
        opt.step(lambda: 0.5 * (weight**2).sum())
        scheduler.step()
        if opt.statistics()["folded_moves"] and moved_at is None:
            moved_at = step
    assert moved_at is not None
    assert moved_at > 20


@pytest.mark.parametrize(
    ("progress", "longest"), [(0.9, 0), (1.2, 1), (5.7, 4), (99, 8)]
)
def test_a_horizon_never_consumes_more_than_the_progress_bound(progress, longest):
    weight = _quadratic()
    opt = _optimizer(
        weight, FixedPredictor(gain=0.01, progress=progress), max_predict_steps=8
    )
    horizons = set()
    for _ in range(120):
        opt.step(lambda: 0.5 * (weight**2).sum())
        horizons.add(opt.last_step.horizon)
    assert max(horizons) <= longest
    assert (longest == 0) == (max(horizons) == 0)


def test_low_confidence_consumes_no_step():
    weight = _quadratic()
    opt = _optimizer(weight, FixedPredictor(gain=0.01, progress=9.0, confidence=0.1))
    for _ in range(30):
        opt.step(lambda: 0.5 * (weight**2).sum())
    assert opt.statistics()["predicted_steps"] == 0
    assert opt.statistics()["folded_moves"] > 0


def test_idle_moves_put_the_optimizer_to_sleep_and_probes_grow_rarer():
    weight = _quadratic()
    opt = _optimizer(weight, FixedPredictor(gain=1e-6, progress=1e-6))
    asleep = []
    for _ in range(900):
        opt.step(lambda: 0.5 * (weight**2).sum())
        asleep.append(opt.run.controller.asleep)
    assert not any(asleep[:IDLE_STEPS])
    assert sum(asleep[450:]) / 450 > sum(asleep[:450]) / 450
    assert sum(asleep) > 600
