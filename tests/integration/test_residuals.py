"""The residual corrector inside real training: fed, applied, saved."""

import copy

import pytest
import torch

from hybridopt import HybridPredictOptimizer
from hybridopt.config import RSSM, ResidualConfig
from hybridopt.correcting import ideal
from hybridopt.types import Move, Observation
from tests.problems import assert_same_bits, regression, train

RESIDUAL = ResidualConfig(enabled=True, rank=2)


def _build(problem, residual=RESIDUAL):
    base = torch.optim.AdamW(problem.model.parameters(), lr=3e-4)
    return HybridPredictOptimizer(
        base, predictor=RSSM(), residual=residual, warmup_steps=5
    )


def test_corrector_is_fed_in_both_spaces_and_training_goes_on():
    problem = regression()
    opt = _build(problem)
    losses = train(problem, opt, 200)
    corrector = opt.run.corrector
    assert len(corrector.store) > 5
    assert corrector.factors is not None
    assert all(torch.isfinite(w).all() for w in problem.weights())
    assert sum(losses[-20:]) < sum(losses[:20])


def test_corrector_off_keeps_nothing():
    problem = regression()
    opt = _build(problem, ResidualConfig())
    train(problem, opt, 100)
    assert len(opt.run.corrector.store) == 0
    assert opt.run.controller.move is None or opt.run.controller.move.predicted is None


def test_resume_with_corrector_equals_uninterrupted():
    problem = regression()
    opt = _build(problem)
    train(problem, opt, 90)
    state = copy.deepcopy(opt.state_dict())
    twin = problem.twin()
    other = _build(twin)
    other.load_state_dict(state)
    assert train(problem, opt, 60, start=90) == train(twin, other, 60, start=90)
    assert_same_bits(problem.weights(), twin.weights())


def _observation(dots):
    columns = torch.tensor([[d, 0.0] for d in dots], dtype=torch.float64)
    size = len(dots)
    return Observation(
        step=1,
        loss=1.0,
        gradient_norm=1.0,
        finite=True,
        gradient_sq=torch.ones(size, dtype=torch.float64),
        dots=columns,
        basis_sq=torch.ones(size, 2, dtype=torch.float64),
        learning_rate=0.1,
        lr_ratio=1.0,
    )


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (2.0, 0.0, 1.0),  # the slope has just vanished: the move was right
        (2.0, 1.0, 2.0),  # half of it is left: twice as far
        (2.0, -2.0, 0.5),  # as steep uphill: half as far
        (2.0, 3.0, 2.0),  # still falling faster: as far as a parabola is believed
        (-1.0, 1.0, 1.0),  # began uphill: nothing is known
    ],
)
def test_ideal_is_where_the_parabola_bottoms_out(begin, end, expected):
    move = Move(
        coefficients=torch.tensor([[3.0, 0.0]], dtype=torch.float64),
        rates=torch.ones(1, dtype=torch.float64),
        horizon=0,
        arm=0,
        context=[],
        progress=1.0,
        worth=1.0,
        base_worth=1.0,
        slopes=torch.tensor([begin], dtype=torch.float64),
    )
    made = ideal(move, _observation([-end]))
    assert made[0, 0].item() == pytest.approx(3.0 * expected)
