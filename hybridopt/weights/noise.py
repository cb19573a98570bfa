"""Is the loss noisy? Told from what real steps measure anyway."""

from __future__ import annotations

from typing import Any

from hybridopt.config import SecantConfig
from hybridopt.history import Window

__all__ = ["NoiseMeter"]

# A change of the loss below this share of it says nothing about noise: float32 losses
# are sums of many terms, each rounded. 256 units of the last place.
_ROUNDING = 256 * 2.0**-24
# Ratio between "noisy beyond doubt" and "low".
_DOUBT = 4.0
# Ratio at which secant moves that are under way come to an end. Near the floor of
# rounding the misfit hovers around the threshold, and a base step amid secant moves, at
# a rate meant for other losses, undoes hundreds of them.
_HELD = 2.0


class NoiseMeter:
    """Compares measured loss changes with what the gradients at both ends predict.

    Over a move d from x to x', the trapezoid rule gives the change of a smooth loss up
    to third order in d: (<g, d> + <g', d>) / 2. Where both losses and gradients belong
    to one function, the misfit is small; where each step draws a new batch or dropout
    mask, the draw's own change of the loss comes on top.

    The misfit is relative to (|<g, d>| + |<g', d>|) / 2, so that a move that crosses a
    valley floor (slopes of opposite sign, small change) does not read as noise.

    No extra forward pass: an online stand-in for evaluating one point on two batches.
    """

    def __init__(self, config: SecantConfig, window: int = 20) -> None:
        self.threshold = config.noise_threshold
        self._window = Window(window)

    def add(
        self, loss_old: float, loss_new: float, slope_old: float, slope_new: float
    ) -> float:
        """Take in one move between two real steps.

        Args:
            loss_old: Loss at the start of the move.
            loss_new: Loss at its end.
            slope_old: Inner product of the gradient at the start with the move.
            slope_new: Inner product of the gradient at the end with the move.

        Returns:
            This move's relative misfit; values that are not finite are not counted.
        """
        change = loss_new - loss_old
        expected = 0.5 * (slope_old + slope_new)
        size = 0.5 * (abs(slope_old) + abs(slope_new))
        floor = _ROUNDING * max(abs(loss_old), abs(loss_new)) + 1e-300
        misfit = abs(change - expected) / (size + floor)
        self._window.add(misfit)
        return misfit

    @property
    def misfit(self) -> float:
        """Median relative misfit over the window; nan before the first move."""
        return self._window.median()

    @property
    def decided(self) -> bool:
        """Whether the window is full, so that ``is_low`` means something."""
        return self._window.full

    @property
    def is_low(self) -> bool:
        """Whether the loss is smooth enough for secant pairs; False until decided."""
        return self.decided and self.misfit < self.threshold

    def stays_low(self, engaged: bool) -> bool:
        """``is_low``, with more patience where secant moves are under way."""
        return self.decided and self.misfit < self.threshold * (
            _HELD if engaged else 1.0
        )

    @property
    def is_high(self) -> bool:
        """Whether it is noisy beyond doubt, so that secant pairs can be given up.

        Between low and high lies a spike of a smooth loss at a large learning rate, or
        the first steps of a noisy one, when all batches still agree.
        """
        return self.decided and self.misfit > _DOUBT * self.threshold

    def reset(self) -> None:
        """Forget every move."""
        self._window.clear()

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return self._window.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError when the window does not fit."""
        self._window.load_state_dict(state)
