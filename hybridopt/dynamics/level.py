"""Whether the loss has risen above its lowest level, by ranks."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import Any

from hybridopt.history import Window

__all__ = ["LossLevel"]

FEWEST = 8
"""Losses per window below which ranks say nothing; they wait for the next window's."""
MOST = 256
"""Losses kept per window, the newest; while secant moves are made no window ends."""
RISEN = (1.0, 3.0)
"""Standard errors above the lowest window between which ``calm`` falls from 1 to 0."""


class LossLevel:
    """Compares the losses of the newest window with those of the lowest one so far.

    With n new losses, m of the lowest window and U the number of pairs in which the
    new one is higher (ties count half),

        z = (U - n m / 2) / sqrt(n m (n + m + 1) / 12),
        calm = clip((3 - z) / 2, 0, 1).

    Ranks, because where steps become unstable single losses jump: these raise a mean's
    standard error as much as the mean. A window with z < 0 is the new lowest one. Where
    the loss is higher for good (new data), no rate is held until it is back.

    Source: Mann and Whitney 1947, "On a test of whether one of two random variables is
    stochastically larger than the other".
    """

    def __init__(self) -> None:
        self.calm = 1.0
        """1 where the loss is at its lowest, 0 where it has plainly risen."""
        self._newest = Window(MOST)
        self._lowest: list[float] = []
        """In ascending order."""

    def add(self, loss: float) -> None:
        """Take in one real step's loss; ignored where it is not finite."""
        self._newest.add(loss)

    def close(self) -> None:
        """End a window: compare, and begin the next."""
        if len(self._newest) < FEWEST:
            return
        newest = sorted(self._newest.values)
        self._newest.clear()
        if not self._lowest:
            self._lowest = newest
            return
        z = _rank_sum(newest, self._lowest)
        start, end = RISEN
        self.calm = min(max((end - z) / (end - start), 0.0), 1.0)
        if z < 0.0:
            self._lowest = newest

    def state_dict(self) -> dict[str, Any]:
        """What was said last, and the losses of both windows."""
        return {
            "calm": self.calm,
            "newest": self._newest.state_dict(),
            "lowest": list(self._lowest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.calm = float(state["calm"])
        self._newest.load_state_dict(state["newest"])
        self._lowest = [float(x) for x in state["lowest"]]


def _rank_sum(new: list[float], old: list[float]) -> float:
    """Standard errors by which ``new`` ranks above ``old``, which is in order."""
    n, m = len(new), len(old)
    higher = sum([bisect_left(old, x) + bisect_right(old, x) for x in new]) / 2.0
    return (higher - n * m / 2.0) / math.sqrt(n * m * (n + m + 1) / 12.0)
