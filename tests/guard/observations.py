"""Observations as the monitor sees them, with everything else at rest."""

from __future__ import annotations

import torch

from hybridopt.types import BASIS_SIZE, Observation
from tests.parts import move


def observation(
    step: int = 0,
    loss: float = 1.0,
    gradient_norm: float = 1.0,
    *,
    finite: bool = True,
    expected_loss: float = float("nan"),
    expected_loss_sigma: float = float("nan"),
) -> Observation:
    """One real step of a model with a single tensor, behind a move so steep that it can
    have caused anything.
    """
    return Observation(
        step=step,
        loss=loss,
        gradient_norm=gradient_norm,
        finite=finite,
        gradient_sq=torch.zeros(1, dtype=torch.float64),
        dots=torch.zeros(1, BASIS_SIZE, dtype=torch.float64),
        basis_sq=torch.zeros(1, BASIS_SIZE, dtype=torch.float64),
        learning_rate=0.1,
        lr_ratio=1.0,
        move=move(loss=expected_loss, loss_sigma=expected_loss_sigma, slope=1e9),
    )
