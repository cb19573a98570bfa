"""What a finished move is credited with."""

import pytest
import torch

from hybridopt.config import FixedHorizon, HybridConfig
from hybridopt.control import Controller, build_policy
from hybridopt.control.context import CONTEXT_SIZE
from hybridopt.types import Forecast, Level, Observation, RecoveryAction, Verdict


def _observation(dots, move=None):
    columns = torch.tensor([[d, 0.0] for d in dots], dtype=torch.float64)
    return Observation(
        step=5,
        loss=1.0,
        gradient_norm=1.0,
        finite=True,
        gradient_sq=torch.ones(len(dots), dtype=torch.float64),
        dots=columns,
        basis_sq=torch.ones(len(dots), 2, dtype=torch.float64),
        learning_rate=0.1,
        lr_ratio=1.0,
        move=move,
    )


def _moved(gains, slopes, efficiency):
    config = HybridConfig(warmup_steps=0)
    controller = Controller(config, build_policy(FixedHorizon(), 16, CONTEXT_SIZE))
    coefficients = torch.tensor([[g, 0.0] for g in gains], dtype=torch.float64)
    sigma = torch.tensor(slopes, dtype=torch.float64)
    worth = float((coefficients[:, 0] * sigma).sum() / sigma.sum())
    forecast = Forecast(coefficients, 1.0, worth * efficiency, worth * efficiency)
    rates = torch.ones(len(gains), dtype=torch.float64)
    verdict = Verdict(Level.OK, RecoveryAction.CONTINUE)
    zero = _observation([0.0] * len(gains))
    move = controller.schedule(zero, verdict, forecast, rates, sigma, True)
    assert move is not None
    return controller, move


@pytest.mark.parametrize("efficiency", [0.5, 0.9])
@pytest.mark.parametrize(
    ("ends", "share"), [((1.0, 3.0), 1.0), ((0.0, 0.0), 0.5), ((-1.0, -3.0), 0.0)]
)
def test_measured_progress_follows_the_trapezoid_whatever_was_forecast(
    ends, share, efficiency
):
    # Worth (4*1 + 2*3) / (1 + 3) = 2.5 base steps; ends are -<g', s> per tensor.
    controller, move = _moved([4.0, 2.0], [1.0, 3.0], efficiency)
    seen = _observation([-e for e in ends], move)
    outcome = controller.outcome(seen, rolled_back=False)
    assert outcome.progress == pytest.approx(2.5 * share)


def test_a_move_taken_back_made_no_progress_and_cost_more():
    controller, move = _moved([4.0, 2.0], [1.0, 3.0], 0.9)
    outcome = controller.outcome(_observation([-1.0, -3.0], move), rolled_back=True)
    assert outcome.progress == 0.0
    assert outcome.cost > 1.0


@pytest.mark.parametrize(
    ("turns", "drift", "moves"),
    [(False, 0.0, False), (True, 0.0, False), (True, 0.01, True)],
)
def test_a_move_worth_nothing_is_made_only_where_drift_moves(turns, drift, moves):
    config = HybridConfig(warmup_steps=0)
    controller = Controller(config, build_policy(FixedHorizon(), 16, CONTEXT_SIZE))
    ones = torch.ones(2, dtype=torch.float64)
    coefficients = torch.tensor([[0.01, drift]] * 2, dtype=torch.float64)
    forecast = Forecast(coefficients, 1.0, 0.01, 0.01, turns_window=turns)
    verdict = Verdict(Level.OK, RecoveryAction.CONTINUE)
    seen = _observation([0.0, 0.0])
    move = controller.schedule(seen, verdict, forecast, ones, ones, True)
    assert (move is not None) is (controller.move is not None) is moves
    for _ in range(30):
        controller.schedule(seen, verdict, forecast, ones, ones, True)
    assert controller.sleep_steps > 0  # and it counts as idle all the same
