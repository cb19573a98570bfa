"""Running statistics over scalars: exact state, no dependence on wall time."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hybridopt.errors import CheckpointError

__all__ = ["RunningMoments", "Window"]


class RunningMoments:
    """Exponential moving mean and variance of a scalar, bias-corrected.

    m <- rho m + (1 - rho) x, q <- rho q + (1 - rho) x^2, both divided by 1 - rho^n.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.count = 0
        self._mean = 0.0
        self._square = 0.0

    def add(self, value: float) -> None:
        """Take in one value; values that are not finite are ignored."""
        if not math.isfinite(value):
            return
        rho = self.memory
        self.count += 1
        self._mean = rho * self._mean + (1 - rho) * value
        self._square = rho * self._square + (1 - rho) * value * value

    @property
    def mean(self) -> float:
        """Bias-corrected mean; nan before the first value."""
        if self.count == 0:
            return math.nan
        return self._mean / (1 - self.memory**self.count)

    @property
    def std(self) -> float:
        """Standard deviation around ``mean``; nan before the second value."""
        if self.count < 2:
            return math.nan
        correction = 1 - self.memory**self.count
        return math.sqrt(max(self._square / correction - self.mean**2, 0.0))

    @property
    def standard_error(self) -> float:
        """Standard error of ``mean`` for independent values:
        std * sqrt((1 - rho) / (1 + rho)), once rho^n is small.
        """
        rho = self.memory
        return self.std * math.sqrt((1 - rho) / (1 + rho))

    def state_dict(self) -> dict[str, Any]:
        """Count and both moments."""
        return {"count": self.count, "mean": self._mean, "square": self._square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        count, mean, square = (state[k] for k in ("count", "mean", "square"))
        self.count, self._mean, self._square = int(count), float(mean), float(square)


class Window:
    """The newest values of a scalar, at most ``size`` of them."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> tuple[float, ...]:
        """Oldest first."""
        return tuple(self._values)

    @property
    def full(self) -> bool:
        """Whether ``size`` values have been seen."""
        return len(self._values) == self._values.maxlen

    def add(self, value: float) -> None:
        """Take in one value; values that are not finite are ignored."""
        if math.isfinite(value):
            self._values.append(value)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()

    def median(self) -> float:
        """Median; nan when empty."""
        if not self._values:
            return math.nan
        ordered = sorted(self._values)
        middle = len(ordered) // 2
        if len(ordered) % 2:
            return ordered[middle]
        return 0.5 * (ordered[middle - 1] + ordered[middle])

    def state_dict(self) -> dict[str, Any]:
        """The values, oldest first."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError when there are more values than fit."""
        values = [float(v) for v in state["values"]]
        size = self._values.maxlen or 0
        if len(values) > size:
            raise CheckpointError(
                f"window of {len(values)} values: must hold at most {size}. "
                "Load with the configuration that the checkpoint was saved with."
            )
        self._values = deque(values, maxlen=size)
