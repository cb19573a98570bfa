"""A move is taken back only for what it can have caused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hybridopt.config import HybridConfig
from hybridopt.errors import RecoveryAction
from hybridopt.guard import DivergenceMonitor
from hybridopt.guard.blame import is_to_blame
from hybridopt.types import BASIS_SIZE, STEP, Level
from tests.guard.observations import observation
from tests.parts import move


def _behind(begin: float, end: float, loss: float, **changes):
    """An observation behind a move with these slopes along it."""
    dots = torch.zeros(1, BASIS_SIZE, dtype=torch.float64)
    dots[0, STEP] = end
    made = move(slope=begin)
    made.coefficients = torch.zeros(1, BASIS_SIZE, dtype=torch.float64)
    made.coefficients[0, STEP] = 1.0
    return replace(observation(loss=loss), move=made, dots=dots, **changes)


@pytest.mark.parametrize(
    ("begin", "end", "to_blame"),
    [
        (0.01, 0.02, False),  # a step up by 4 cannot come from slopes like these
        (0.01, 2.5, True),  # steep uphill at its end
        (3.0, 0.0, True),  # a plunge that ended on a plateau
        (-3.0, 0.0, True),
        (math.nan, 0.02, False),  # drift: only the end is known
    ],
)
def test_slopes_have_to_account_for_the_excess(begin, end, to_blame):
    assert is_to_blame(_behind(begin, end, loss=5.0), usual_loss=1.0) is to_blame


def test_a_move_is_to_blame_in_doubt():
    seen = _behind(0.0, 0.0, loss=5.0)
    assert not is_to_blame(seen, usual_loss=1.0)
    assert is_to_blame(seen, usual_loss=math.nan)
    assert is_to_blame(replace(seen, move=None), usual_loss=1.0)
    assert is_to_blame(replace(seen, gradient_norm=math.nan), usual_loss=1.0)
    # An exploding gradient without a higher loss.
    assert is_to_blame(seen, usual_loss=9.0)


@pytest.mark.parametrize("steep", [True, False])
def test_monitor_keeps_the_hard_batch_of_an_innocent_move(steep):
    monitor = DivergenceMonitor(HybridConfig())
    for step in range(60):
        monitor.absorb(observation(step, 1.0 + 0.01 * math.sin(step)))
    hard = _behind(1e-3, 3.0 if steep else 1e-3, loss=5.0)
    verdict = monitor.judge(hard, can_roll_back=True)
    assert verdict.level is Level.CRITICAL
    expected = RecoveryAction.ROLL_BACK if steep else RecoveryAction.CONTINUE
    assert verdict.action is expected


def test_monitor_takes_nan_back_whoever_is_to_blame():
    monitor = DivergenceMonitor(HybridConfig())
    for step in range(60):
        monitor.absorb(observation(step, 1.0))
    broken = _behind(0.0, 0.0, loss=math.nan, finite=False)
    verdict = monitor.judge(broken, can_roll_back=True)
    assert verdict.action is RecoveryAction.ROLL_BACK
