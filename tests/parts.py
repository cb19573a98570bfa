"""Parts with known behavior, to put into an optimizer under test."""

from __future__ import annotations

import torch

from hybridopt.types import Forecast


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
