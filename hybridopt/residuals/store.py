"""A bounded ring of past prediction residuals in coefficient space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import CheckpointError, ConfigError

__all__ = ["ResidualStore"]


class ResidualStore:
    """The newest residuals: what was predicted, what would have been ideal, and when.

    'When' is the predictor's latent state (k,), by which residuals are compared.
    A residual of another shape than those held (another model or predictor) starts the
    ring anew, since the old ones say nothing about it.

    Args:
        capacity: Most residuals kept.
        byte_limit: Most bytes kept; where it is short, fewer residuals are.

    Raises:
        ConfigError: ``capacity`` below 1 or a negative ``byte_limit``.
    """

    def __init__(self, capacity: int, byte_limit: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity={capacity}: must be >= 1. Use 64.")
        if byte_limit < 0:
            raise ConfigError(f"byte_limit={byte_limit}: must be >= 0. Use 2**22.")
        self.capacity = capacity
        self.byte_limit = byte_limit
        self._allocate(0, 0, 0)

    def _allocate(self, k: int, rows: int, columns: int) -> None:
        """An empty ring for latents (k,) and coefficients (rows, columns)."""
        self._shape = (k, rows, columns)
        item = 8 * (k + 2 * rows * columns)
        slots = min(self.capacity, self.byte_limit // item) if item else 0
        self._latents = torch.zeros(slots, k, dtype=torch.float64)
        self._predicted = torch.zeros(slots, rows, columns, dtype=torch.float64)
        self._ideal = torch.zeros_like(self._predicted)
        self._count = 0
        self._next = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> tuple[int, int]:
        """(L, J) of the coefficients held; (0, 0) before the first residual."""
        return self._shape[1], self._shape[2]

    @property
    def slots(self) -> int:
        """Most residuals that fit: the capacity, or what the byte limit allows."""
        return self._latents.shape[0]

    @property
    def latents(self) -> Tensor:
        """(n, k) in slot order; a view."""
        return self._latents[: self._count]

    @property
    def predicted(self) -> Tensor:
        """(n, L, J) in slot order; a view."""
        return self._predicted[: self._count]

    @property
    def ideal(self) -> Tensor:
        """(n, L, J) in slot order; a view."""
        return self._ideal[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._latents.nbytes + self._predicted.nbytes + self._ideal.nbytes

    def newest(self, count: int) -> list[int]:
        """Slots of the ``count`` newest residuals, newest first; fewer if few."""
        slots = self.slots
        return [(self._next - 1 - i) % slots for i in range(min(count, self._count))]

    def add(self, latent: Tensor, predicted: Tensor, ideal: Tensor) -> bool:
        """Keep a residual, in place of the oldest when the ring is full.

        Args:
            latent: (k,); copied, as are the others.
            predicted: (L, J) coefficients as predicted, before any correction.
            ideal: (L, J) coefficients that would have been right.

        Returns:
            Whether it was kept; one that is not finite or larger than the byte limit
            is not.

        Raises:
            ConfigError: Shapes that do not fit together.
        """
        if latent.ndim != 1 or predicted.ndim != 2 or predicted.shape != ideal.shape:
            raise ConfigError(
                f"residual of latent {tuple(latent.shape)}, predicted "
                f"{tuple(predicted.shape)}, ideal {tuple(ideal.shape)}: must be (k,), "
                "(L, J), (L, J). Pass the predictor's own latent and coefficients."
            )
        if not all(bool(t.isfinite().all()) for t in (latent, predicted, ideal)):
            return False
        shape = (latent.shape[0], predicted.shape[0], predicted.shape[1])
        if shape != self._shape:
            self._allocate(*shape)
        if self.slots == 0:
            return False
        self._latents[self._next] = latent.detach()
        self._predicted[self._next] = predicted.detach()
        self._ideal[self._next] = ideal.detach()
        self._next = (self._next + 1) % self.slots
        self._count = min(self._count + 1, self.slots)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Filled slots in slot order, so that sums over them repeat bit for bit."""
        return {
            "shape": list(self._shape),
            "slots": self.slots,
            "next": self._next,
            "latents": self.latents.clone(),
            "predicted": self.predicted.clone(),
            "ideal": self.ideal.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; CheckpointError and no change when it does not fit."""
        try:
            shape = [int(v) for v in state["shape"]]
            slots, position = int(state["slots"]), int(state["next"])
            tensors = [state[name] for name in ("latents", "predicted", "ideal")]
        except (KeyError, TypeError, ValueError) as error:
            raise _mismatch(f"broken entry ({error!r})") from None
        if len(shape) != 3 or min(shape) < 0:
            raise _mismatch(f"shape={shape}: must be three sizes")
        fresh = ResidualStore(self.capacity, self.byte_limit)
        fresh._allocate(*shape)
        if fresh.slots != slots:
            raise _mismatch(f"slots={slots}: must be {fresh.slots}")
        count = len(tensors[0]) if isinstance(tensors[0], Tensor) else -1
        # While the ring fills, the next slot is the first empty one.
        positions = range(count, count + 1) if count < slots else range(max(slots, 1))
        if not 0 <= count <= slots or position not in positions:
            raise _mismatch(f"next={position} with {count} of {slots} slots filled")
        held = (fresh._latents, fresh._predicted, fresh._ideal)
        for loaded, target in zip(tensors, held, strict=True):
            _fill(target, loaded, count)
        fresh._count, fresh._next = count, position
        vars(self).update(vars(fresh))


def _fill(target: Tensor, loaded: Any, count: int) -> None:
    """Write the first ``count`` slots; CheckpointError unless they fit exactly."""
    expected = (count, *target.shape[1:])
    if (
        not isinstance(loaded, Tensor)
        or tuple(loaded.shape) != expected
        or loaded.dtype != torch.float64
        or not bool(loaded.isfinite().all())
    ):
        raise _mismatch(f"must hold finite float64 tensors of {expected}")
    target[:count] = loaded


def _mismatch(rule: str) -> CheckpointError:
    return CheckpointError(
        f"state of the residual store: {rule}. "
        "Load with the configuration that the checkpoint was saved with."
    )
