"""Whether gradients, one after the other, go on agreeing with the drift."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hybridopt.types import DRIFT, Observation

__all__ = ["Persistence"]

KEPT, TAKEN = 0.8, 0.6
"""Squares add up to 1: where nothing persists, e has the variance of a window's z."""
LARGEST = 3.0
"""|z| of one window at most: seven measurements have a poor idea of their noise."""
FEWEST = 3
"""Measurements in a window below which it says nothing."""
PROVEN, DISPROVEN = 1.0, -1.5
DOUBTED = -0.75


class Persistence:
    """Significance over the steps of a window, where the gains' evidence is that over
    tensors.

    With c_i = -<g_i, d> / (||g_i|| ||d||) over all weights together, at each of a
    window's n measured steps, and w_i the steps that measurement stands for:

        m = sum w c / sum w,
        s^2 = n / (n - 1) sum w (c - m)^2 / sum w,
        z = m / sqrt(s^2 sum w^2 / (sum w)^2 (1 + r) / (1 - r)),
        e <- 0.8 e + 0.6 clip(z, -3, 3)        once per window.

    r = sum w mu^w / sum w is what two averages with memory mu that lie w steps apart
    have in common; 0 where gradients themselves were measured. Gradients of different
    steps have independent noise; tensors are few, unlike, and share their batches: with
    batches of two or noisy labels z over tensors is 1 to 2 by chance where z over steps
    is -1 to -4 (research notes, "What the steps say").

    Until e has once been above 1, and again once it is below -1.5, it is a condition
    for moving at all, see ``share`` and ``doubted``. After that a small negative e says
    no more than that moves have been going far enough.

    Source: the standard error of a mean of an AR(1) series, e.g. Geyer 1992, "Practical
    Markov chain Monte Carlo", section 3.
    """

    def __init__(self) -> None:
        self.evidence = 0.0
        """e."""
        self.proven = False
        self._cosines: list[tuple[float, float, float]] = []
        """c, w and mu^w of the window so far."""

    def add(self, observation: Observation, steps: float) -> None:
        """Take in a step that was measured along the drift.

        Args:
            observation: The step's.
            steps: Real steps that the measurement stands for, itself included.
        """
        direction = observation.basis_sq.numpy()[:, DRIFT].sum()
        square = float(observation.gradient_sq.numpy().sum() * direction)
        if not 0.0 < square < math.inf:
            return
        cosine = -float(observation.dots.numpy()[:, DRIFT].sum()) / math.sqrt(square)
        self._cosines.append((cosine, steps, observation.drift_memory**steps))

    def forget(self) -> None:
        """Begin a window."""
        self._cosines = []

    def close(self) -> None:
        """Take the window's significance in."""
        z = max(-LARGEST, min(self.significance, LARGEST))
        self.evidence = KEPT * self.evidence + TAKEN * z
        if self.evidence > PROVEN:
            self.proven = True
        elif self.evidence < DISPROVEN:
            self.proven = False

    @property
    def significance(self) -> float:
        """The window's z so far; 0 before its third measurement."""
        if len(self._cosines) < FEWEST:
            return 0.0
        cosines, weights, common = np.array(self._cosines).T
        count, total = len(cosines), weights.sum()
        mean = float((weights * cosines).sum() / total)
        spread = (weights * (cosines - mean) ** 2).sum() / total * count / (count - 1)
        shared = (weights * common).sum() / total
        inflation = (1.0 + shared) / (1.0 - shared)
        error = math.sqrt(spread * (weights**2).sum() / total**2 * inflation)
        return mean / (error + 1e-12)

    @property
    def share(self) -> float:
        """Share of a move to make: 1 where proven, else clip(1 + e / 0.75, 0, 1)."""
        return 1.0 if self.proven else min(max(1.0 - self.evidence / DOUBTED, 0.0), 1.0)

    @property
    def doubted(self) -> bool:
        """Whether steps speak against the drift, and have not spoken for it before."""
        return not self.proven and self.evidence < DOUBTED

    def state_dict(self) -> dict[str, Any]:
        """The evidence, and the window so far."""
        return {
            "evidence": self.evidence,
            "proven": self.proven,
            "cosines": [list(measured) for measured in self._cosines],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.evidence, self.proven = float(state["evidence"]), bool(state["proven"])
        self._cosines = [
            (float(cosine), float(weight), float(common))
            for cosine, weight, common in state["cosines"]
        ]
