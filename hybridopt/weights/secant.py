"""The secant mover: quasi-Newton moves from pairs that real steps give for free.

For low-noise problems on small networks. Each real gradient is followed by a move
x -> x + J with J = -H g, H the L-BFGS inverse Hessian of the newest secant pairs on top
of a diagonal, half the base optimizer's and half from the pairs. Nothing is evaluated
to confirm a move: the next real step's own loss judges it. The order of calls at a real
step is:

    accepted = mover.judge(loss)              # before any weight moves
    mover.record(flatten(weights), flatten_gradients(weights))
    if accepted:
        the base optimizer steps; the new weights are the anchor
        direction = mover.direction(preconditioner(base, weights))
        if direction is not None:
            set_flat_(weights, mover.propose(direction, loss))
    else:
        the weights go back to the anchor; the base does not step
        shorter = mover.retry()
        if shorter is not None:
            set_flat_(weights, shorter)

Rejected points still teach: their pair stays in memory. The retry only shortens the
move; the direction turns with the next accepted gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hybridopt.config import SecantConfig
from hybridopt.errors import CheckpointError
from hybridopt.weights.secant_pairs import PairMemory

__all__ = ["SecantMover", "affordable_pairs"]

_EXTRA_COPIES = 7
"""Weight copies beyond the pairs: sums of squares (2), position, gradient, direction,
scratch (2)."""
_BOOST = 2.0
"""Factor on the scale that the newest pair gives to H0. That scale, s.y / y.(D y),
weighs stiff directions most and left steps about a third short of the minimum along
them (median over tasks, measured by the slopes at both ends)."""
_MINIMUM_PAIRS = 2
"""Pairs before the first move: one alone sets only the scale."""


def affordable_pairs(
    config: SecantConfig, size: int, element_bytes: int, budget_bytes: float
) -> int:
    """How many pairs fit in a memory budget, at most ``config.pairs``.

    Args:
        config: Its ``pairs`` is the upper bound.
        size: n, number of weights.
        element_bytes: Bytes per weight.
        budget_bytes: Memory for 2 m + 7 weight copies.

    Returns:
        m, or 0 when the budget does not hold the two pairs that a move needs.
    """
    copies = budget_bytes / max(size * element_bytes, 1)
    pairs = min(config.pairs, int((copies - _EXTRA_COPIES) // 2))
    return pairs if pairs >= _MINIMUM_PAIRS else 0


class SecantMover:
    """Keeps secant pairs, proposes moves, and takes back those that made it worse.

    All vectors are flat, in the parameters' dtype, on their device. The mover never
    writes weights: it says where to go. Buffers are allocated at the first ``record``.

    Args:
        pairs: m, most pairs kept (``affordable_pairs``).
        config: Warm-up, curvature bound, shrink factor, number of retries.
    """

    def __init__(self, pairs: int, config: SecantConfig) -> None:
        self.pairs = pairs
        self.config = config
        self._memory: PairMemory | None = None
        self._position: Tensor | None = None
        self._gradient: Tensor | None = None
        self._direction: Tensor | None = None
        self._loss = math.nan
        self._rejects = 0
        self._rejected = False
        self.proposed = 0
        self.accepted = 0

    @property
    def pending(self) -> bool:
        """Whether a move awaits the judgement of the next real step."""
        return self._direction is not None

    @property
    def count(self) -> int:
        """Pairs in memory."""
        return 0 if self._memory is None else self._memory.count

    @property
    def scale(self) -> float:
        """Factor on the pending move: ``shrink`` to the number of rejections."""
        return self.config.shrink**self._rejects

    def judge(self, loss: float) -> bool:
        """Accept or reject the pending move by the loss at the point it led to.

        Accepted moves are no longer pending. After a rejection call ``record``, then
        ``retry``.

        Args:
            loss: Loss of this real step, the same over all ranks.

        Returns:
            True when nothing is pending or the loss is finite and below the loss
            before the move.
        """
        self._rejected = False
        if not self.pending:
            return True
        if math.isfinite(loss) and loss < self._loss:
            self.accepted += 1
            self._clear_pending()
            return True
        self._rejected = True
        self._rejects += 1
        return False

    def record(self, position: Tensor, gradient: Tensor) -> tuple[float, float] | None:
        """Keep the secant pair from the last accepted point to this one, if it is
        finite and s.y > c ||s|| ||y||.

        Call once per real step, after ``judge``. A rejected point gives a pair but does
        not become the point that the next pair starts from.

        Args:
            position: (n,) weights at which the gradient was taken. The mover keeps the
                tensor: hand over a fresh copy (``flatten``).
            gradient: (n,) the real gradient there, likewise.

        Returns:
            Slopes of the loss at both ends of the way here from the last point, what
            ``NoiseMeter.add`` takes: (<g, x' - x>, <g', x' - x>). None when no point
            was recorded before.
        """
        slopes, kept = None, False
        if self._position is not None and self._gradient is not None:
            s, y = position - self._position, gradient - self._gradient
            numbers = [s @ y, s @ s, y @ y, self._gradient @ s, gradient @ s]
            *sizes, old, new = torch.stack(numbers).tolist()
            end = None if self._rejected else gradient
            memory, minimum = self._pairs_for(position), self.config.minimum_curvature
            kept = memory.add(s, y, minimum, sizes, end)
            if kept and self._rejected:
                memory.note(old / math.sqrt(sizes[1]))
            slopes = old, new
        if not self._rejected:
            self._position, self._gradient = position, gradient
            if self._memory is not None and not kept:
                self._memory.look(gradient)
        return slopes

    def direction(self, scale: Tensor) -> Tensor | None:
        """J = -H g at the point recorded last, or None when there is no safe one.

        Args:
            scale: (n,) diagonal of the base optimizer (``preconditioner``), after its
                step.

        Returns:
            (n,) new tensor with <g, J> < 0; None with fewer than two pairs, after a
            rejection, or when J is not finite or does not descend.
        """
        memory, gradient = self._memory, self._gradient
        if memory is None or gradient is None or memory.count < _MINIMUM_PAIRS:
            return None
        diagonal = memory.diagonal(scale)
        direction = memory.solve(gradient, diagonal, _BOOST, seen=True).neg_()
        slope = float(gradient @ direction)
        return direction if -math.inf < slope < 0.0 else None

    def propose(self, direction: Tensor, loss: float) -> Tensor:
        """Make the move to x + J pending, x being the point recorded last.

        Args:
            direction: (n,) J from ``direction``; the mover keeps the tensor.
            loss: Loss at x, what the move has to beat.

        Returns:
            (n,) x + J, new: the weights to go to.

        Raises:
            RuntimeError: No point was recorded; nothing was changed.
        """
        if self._position is None:
            raise RuntimeError("propose: no point recorded. Call record(x, g) first.")
        self._direction = direction
        self._loss = loss
        self._rejects = 0
        self.proposed += 1
        return self._position + direction

    def retry(self) -> Tensor | None:
        """Where the shortened move leads, after a rejection.

        Returns:
            (n,) x + shrink^r J, new: the weights to go to. None after ``max_rejects``
            rejections in a row: then the weights stay at the anchor, nothing is
            pending, and the next real step may propose again.
        """
        if self._direction is None or self._position is None:
            return None
        if self._rejects > self.config.max_rejects:
            self._clear_pending()
            return None
        return torch.add(self._position, self._direction, alpha=self.scale)

    def abandon(self) -> None:
        """Forget the pending move and the last point, keep the pairs.

        For weights that were changed by someone else: a rollback, another mover.
        """
        self._clear_pending()
        self._rejected = False
        self._position = self._gradient = None

    def reset(self) -> None:
        """Forget everything but the counters of moves; frees nothing."""
        self.abandon()
        if self._memory is not None:
            self._memory.clear()

    def release(self) -> None:
        """Forget everything and give the pairs' memory back."""
        self.abandon()
        self._memory = None

    def _clear_pending(self) -> None:
        self._direction = None
        self._loss = math.nan
        self._rejects = 0

    def _pairs_for(self, like: Tensor) -> PairMemory:
        if self._memory is None:
            self._memory = PairMemory(self.pairs, like.numel(), like.dtype, like.device)
        return self._memory

    def state_dict(self) -> dict[str, Any]:
        """Pairs, last point, pending move and counters; tensors are copies."""

        def copy(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.clone()

        return {
            "memory": None if self._memory is None else self._memory.state_dict(),
            "position": copy(self._position),
            "gradient": copy(self._gradient),
            "direction": copy(self._direction),
            "loss": self._loss,
            "rejects": self._rejects,
            "rejected": self._rejected,
            "proposed": self.proposed,
            "accepted": self.accepted,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore; raises CheckpointError and changes nothing on a mismatch.

        Args:
            state: What ``state_dict`` returned; checkpoints bring it to the host.
            device: Where the weights are, and where everything here goes.
        """
        vectors = {name: state[name] for name in ("position", "gradient", "direction")}
        sizes = {v.numel() for v in vectors.values() if v is not None}
        pairs = state["memory"]
        if pairs is not None:
            sizes.add(int(pairs["s"].shape[1]))
        if len(sizes) > 1:
            raise CheckpointError(
                f"secant state with vectors of {sorted(sizes)} elements: must all have "
                "the same length. The checkpoint is damaged; use an older one."
            )
        memory = None
        if pairs is not None:
            like = pairs["s"]
            memory = PairMemory(self.pairs, like.shape[1], like.dtype, device)
            memory.load_state_dict(pairs)
        self._memory = memory
        self._position, self._gradient, self._direction = (
            None if v is None else v.to(device, copy=True) for v in vectors.values()
        )
        self._loss, self._rejects = float(state["loss"]), int(state["rejects"])
        self._rejected = bool(state["rejected"])
        self.proposed, self.accepted = int(state["proposed"]), int(state["accepted"])
