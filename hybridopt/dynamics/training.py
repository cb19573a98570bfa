"""Online training: what was seen, and one Adam for all weights of a small network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridopt.dynamics.correction import CHANNELS, bounded
from hybridopt.dynamics.features import FEATURES
from hybridopt.dynamics.state import tensor_like
from hybridopt.errors import CheckpointError

__all__ = ["FlatNetwork", "SampleRing", "gaussian_loss", "split_channels"]


class FlatNetwork:
    """The weights of a network as one float32 vector, trained by Adam.

    One vector makes an Adam step a handful of operations however many layers there
    are. ``torch.optim`` and ``nn.Module`` are left out on purpose: hooks that users
    register globally on them would fire for the predictor's own training.

    Source: Adam, Kingma and Ba 2015; betas (0.9, 0.99) since updates are few.
    """

    BETAS = (0.9, 0.99)
    EPSILON = 1e-8

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        zero: frozenset[str],
        learning_rate: float,
        generator: torch.Generator,
    ) -> None:
        """Draw the weights.

        Args:
            shapes: Shape per weight; matrices are (inputs, outputs), vectors are
                biases and start at zero.
            zero: Matrices that start at zero: output layers.
            learning_rate: Of Adam.
            generator: Draws matrices from a normal of variance 1 / inputs.
        """
        self._shapes = shapes
        self._learning_rate = learning_rate
        parts = []
        for name, shape in shapes.items():
            if len(shape) == 1 or name in zero:
                part = torch.zeros(shape, dtype=torch.float32, device="cpu")
            else:
                part = torch.empty(shape, dtype=torch.float32, device="cpu")
                part.normal_(0.0, 1.0 / math.sqrt(shape[0]), generator=generator)
            parts.append(part.reshape(-1))
        self._counts = [part.numel() for part in parts]
        self._vector = torch.cat(parts)
        self._first = torch.zeros_like(self._vector)
        self._second = torch.zeros_like(self._vector)
        self.updates = 0
        """Adam steps taken."""
        self.weights = self._views(self._vector)
        """Name -> tensor; views that are replaced by every update."""

    def _views(self, vector: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(vector, self._counts)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def train(self, loss: Callable[[dict[str, Tensor]], Tensor]) -> float:
        """One Adam step on ``loss(weights)``; skipped if anything is not finite.

        Returns:
            The loss before the step.
        """
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self._vector.clone().requires_grad_()
            value = loss(self._views(leaf))
            (gradient,) = torch.autograd.grad(value, leaf)
        if not bool(gradient.isfinite().all()):
            return math.nan
        self.updates += 1
        fast, slow = self.BETAS
        self._first = torch.lerp(self._first, gradient, 1 - fast)
        self._second = torch.lerp(self._second, gradient * gradient, 1 - slow)
        size = self._learning_rate / (1 - fast**self.updates)
        scale = (self._second / (1 - slow**self.updates)).sqrt_().add_(self.EPSILON)
        self._vector = torch.addcdiv(self._vector, self._first, scale, value=-size)
        self.weights = self._views(self._vector)
        return float(value.detach())

    def state_dict(self) -> dict[str, Any]:
        """Weights and both moments."""
        return {
            "updates": self.updates,
            "adam": torch.stack((self._vector, self._first, self._second)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError when the network has another size."""
        like = torch.stack((self._vector, self._first, self._second))
        adam = tensor_like(state, "adam", like)
        self.updates = int(state["updates"])
        self._vector, self._first, self._second = adam.unbind(0)
        self.weights = self._views(self._vector)


class SampleRing:
    """The newest (features, targets) rows of every tracked tensor, in real steps.

    Of more than ``MAX_TENSORS`` tensors, that many evenly spaced ones are tracked, so
    that the ring and the checkpoint stay below 1 MiB. Float16 holds standardized,
    clipped numbers well enough to learn from.
    """

    CAPACITY = 256
    MAX_TENSORS = 64

    def __init__(self, size: int, extra: int) -> None:
        """Args: ``extra`` is the number of columns kept beside features and targets."""
        self._tracked: Tensor | None = None
        if size > self.MAX_TENSORS:
            every = torch.arange(self.MAX_TENSORS, dtype=torch.int64, device="cpu")
            self._tracked = every * size // self.MAX_TENSORS
        self.tensors = min(size, self.MAX_TENSORS)
        """How many tensors are tracked."""
        self._extra = extra
        self._width = len(FEATURES) + CHANNELS + extra
        self._rows = self._zeros(self.CAPACITY)
        self._first = [False] * self.CAPACITY
        self._broken = True
        self.added = 0
        """Rows ever added."""

    def _zeros(self, count: int) -> Tensor:
        shape = (count, self.tensors, self._width)
        return torch.zeros(shape, dtype=torch.float16, device="cpu")

    def __len__(self) -> int:
        return min(self.added, self.CAPACITY)

    def add(self, features: Tensor, targets: Tensor, extra: Tensor | None) -> None:
        """Append successive steps: (T, L, F), (T, L, CHANNELS), (T, tracked, extra)."""
        both = torch.cat((features, targets.float()), -1)
        if self._tracked is not None:
            both = both[:, self._tracked]
        if extra is not None:
            both = torch.cat((both, extra), -1)
        for row in both:
            at = self.added % self.CAPACITY
            self._rows[at] = row
            self._first[at] = self._broken
            self._broken = False
            self.added += 1

    def break_sequence(self) -> None:
        """The next row does not follow from the last one."""
        self._broken = True

    def draw(
        self, count: int, steps: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample ``count`` sequences of ``steps`` consecutive rows of random tensors.

        Needs ``len(self) >= steps``.

        Returns:
            Features (steps, count, F), targets (steps, count, CHANNELS), extra columns
            (steps, count, extra), all float32, and (steps, count) bool: whether the
            row starts a new sequence.
        """
        oldest = self.added - len(self)
        begin = self._integers(len(self) - steps + 1, count, generator) + oldest
        tensor = self._integers(self.tensors, count, generator)
        offset = torch.arange(steps, dtype=torch.int64, device="cpu").unsqueeze(1)
        at = (begin + offset) % self.CAPACITY
        rows = self._rows[at, tensor].float()
        first = torch.tensor(self._first, dtype=torch.bool, device="cpu")[at]
        width = len(FEATURES)
        return (
            rows[..., :width],
            rows[..., width : width + CHANNELS],
            rows[..., width + CHANNELS :],
            first,
        )

    @staticmethod
    def _integers(below: int, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(
            below, (count,), generator=generator, dtype=torch.int64, device="cpu"
        )

    def state_dict(self) -> dict[str, Any]:
        """The rows in use."""
        used = len(self)
        return {
            "added": self.added,
            "broken": self._broken,
            "first": bytes(self._first[:used]),
            "rows": self._rows[:used].clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError when the rows have another shape."""
        added, first = int(state["added"]), [bool(b) for b in state["first"]]
        used = min(added, self.CAPACITY)
        if added < 0 or len(first) != used:
            raise CheckpointError(
                f"predictor state 'first' of {len(first)} rows: must have {used}. "
                "The checkpoint is damaged; load another one."
            )
        kept = tensor_like(state, "rows", self._zeros(used))
        self._rows = torch.cat((kept, self._zeros(self.CAPACITY - used)))
        self._first = first + [False] * (self.CAPACITY - used)
        self._broken = bool(state["broken"])
        self.added = added


def split_channels(output: Tensor) -> tuple[Tensor, Tensor]:
    """Means and bounded log scales from the last axis, 2 CHANNELS wide."""
    return output[..., :CHANNELS], bounded(output[..., CHANNELS:])


def gaussian_loss(mean: Tensor, log_scale: Tensor, targets: Tensor) -> Tensor:
    """Gaussian negative log likelihood per element, without its constant.

    Targets that are nan cost nothing and have no gradient.
    """
    error = (targets - mean).nan_to_num(0.0)
    known = ~targets.isnan()
    return (0.5 * (error * (-log_scale).exp()).square() + log_scale) * known
