"""Parts with known behavior, to put into an optimizer under test."""

from __future__ import annotations

import pytest
import torch

from hybridopt import phases
from hybridopt.types import Forecast, Move


def watch_unseen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the calls that pass unseen from now on; the list grows."""
    found: list[int] = []
    passes = phases._unseen_step

    def watched(run, look, step_base):
        found.append(run.counters.steps)
        return passes(run, look, step_base)

    monkeypatch.setattr(phases, "_unseen_step", watched)
    return found


def move(coefficients: torch.Tensor | None = None, **fields: object) -> Move:
    """A move of which a test names what matters to it; worth nothing otherwise."""
    if coefficients is None:
        coefficients = torch.zeros(1, 2, dtype=torch.float64)
    values: dict = {
        "coefficients": coefficients,
        "rates": torch.ones(len(coefficients), dtype=torch.float64),
        "horizon": 0,
        "arm": 0,
        "context": [],
        "progress": 0.0,
        "worth": 0.0,
        "base_worth": 0.0,
    }
    return Move(**(values | fields))


def move_of(forecast: Forecast, slopes: torch.Tensor, **fields: object) -> Move:
    """The move that a forecast proposes, as the controller would record it."""
    slope = float((forecast.coefficients[:, 0] * slopes).sum())
    values = {"progress": forecast.progress, "slope": slope}
    return move(forecast.coefficients, **(values | fields))


class FixedPredictor:
    """Every move has the same gain and the same claimed progress."""

    def __init__(self, gain: float, progress: float, confidence: float = 1.0) -> None:
        self.moving = False
        self.gain = gain
        self.progress = progress
        self.confidence = confidence
        self.outcomes: list = []
        self.size = 0

    def observe(self, observation):
        self.size = observation.dots.shape[0]

    def forecast(self, slopes):
        coefficients = torch.zeros(len(slopes), 2, dtype=torch.float64)
        coefficients[:, 0] = self.gain
        return Forecast(coefficients, self.confidence, self.progress, self.progress)

    def feedback(self, outcome):
        self.outcomes.append(outcome)

    def reset(self):
        self.outcomes = []

    def state_dict(self):
        return {"moving": self.moving}

    def load_state_dict(self, state):
        self.moving = bool(state["moving"])
