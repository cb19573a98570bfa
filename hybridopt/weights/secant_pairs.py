"""The newest secant pairs and the inverse Hessian that they imply (L-BFGS).

A pair (s, y) is a displacement and the change of the gradient over it, so y ~ B s with
B the Hessian. Real steps give pairs for free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import CheckpointError

__all__ = ["PairMemory"]

_CURVATURE_FLOOR = 1e-6
"""Floor under a weight's sum of y^2, relative to the mean over weights."""


class PairMemory:
    """A ring of secant pairs that applies the L-BFGS inverse Hessian in four passes.

    Pairs are kept divided by ||s||, which leaves L-BFGS unchanged (it is invariant to
    the scale of a pair) and keeps the triangular matrix below well scaled.

    Attributes:
        capacity: m, the most pairs kept.
        count: Pairs in memory.
        head: Slot that the next pair is written to; the oldest one's once full.

    Memory: 2 (m + 1) n in the parameters' dtype and m^2 + m in float64.
    """

    def __init__(
        self, capacity: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.count = 0
        self.head = 0
        self._pairs = torch.zeros(2, capacity, size, dtype=dtype, device=device)
        self._s, self._y = self._pairs.unbind(0)
        # Sums over the stored pairs of s^2 and y^2, per weight.
        self._squares = torch.zeros(2, size, dtype=dtype, device=device)
        self._moved, self._changed = self._squares.unbind(0)
        # By slot: the inverse of R, see ``solve``, and the products s_i . y_i.
        self._inverse = torch.zeros(
            capacity, capacity, dtype=torch.float64, device=device
        )
        self._curvatures = torch.zeros(capacity, dtype=torch.float64, device=device)
        self._newest = 0.0
        # By slot: s_i . g for the gradient g that ``look`` was last given.
        self._seen = torch.zeros(capacity, dtype=torch.float64, device=device)

    @property
    def size(self) -> int:
        """n, the length of the vectors."""
        return self._s.shape[1]

    def add(
        self,
        s: Tensor,
        y: Tensor,
        minimum_curvature: float,
        sizes: Sequence[float] | None = None,
        end: Tensor | None = None,
    ) -> bool:
        """Keep a pair, in place of the oldest when full, if s.y > c ||s|| ||y||.

        Args:
            s: (n,) displacement; read only.
            y: (n,) change of the gradient over it; read only.
            minimum_curvature: c, which keeps the inverse Hessian positive definite.
            sizes: s.y, ||s||^2 and ||y||^2, if they are known.
            end: (n,) the gradient at the pair's end, if the one at its beginning was
                looked at; the memory then looks at this one, in the same pass.

        Returns:
            Whether the pair was kept; False for pairs that are not finite.

        Cost: one pass over the stored displacements; without ``sizes`` one copy of 3
        numbers to the host.
        """
        if sizes is None:
            sizes = torch.stack([s @ y, s @ s, y @ y]).tolist()
        sy, ss, yy = sizes
        if not (math.isfinite(yy) and ss > 0.0 and yy > 0.0):
            return False
        if not sy > minimum_curvature * math.sqrt(ss) * math.sqrt(yy):
            return False
        slot, scale = self.head, 1.0 / math.sqrt(ss)
        if not math.isfinite(scale):
            return False
        pair = self._pairs[:, slot]
        full = self.count == self.capacity
        if full:
            self._squares.addcmul_(pair, pair, value=-1.0)
        torch.mul(s, scale, out=pair[0])
        torch.mul(y, scale, out=pair[1])
        self._squares.addcmul_(pair, pair)
        self.count = min(self.count + 1, self.capacity)
        self.head = (slot + 1) % self.capacity
        if end is None:
            column = self._s[: self.count].mv(pair[1]).double()
        else:
            # S y = S g' - S g, as exact as y itself, which is such a difference too.
            seen = self._project(end)
            column = (seen - self._seen[: self.count]).mul_(scale)
            self._seen[: self.count] = seen
        self._extend_inverse(slot, column, sy * scale * scale)
        if self.head == 0:
            # Subtracting pairs leaves rounding behind: start afresh once per round.
            torch.sum(self._pairs * self._pairs, 1, out=self._squares)
        elif full:
            self._squares.clamp_min_(0.0)
        return True

    def look(self, gradient: Tensor) -> None:
        """Say which gradient comes next, as the argument of ``solve`` and at the
        beginning of the next pair: what the pairs make of it is needed by both.
        """
        self._seen[: self.count] = self._project(gradient)

    def note(self, slope: float) -> None:
        """Look at the newest pair too, which was added without an ``end``.

        Args:
            slope: s . g / ||s||, g being the gradient looked at.
        """
        self._seen[(self.head - 1) % self.capacity] = slope

    def _project(self, vector: Tensor) -> Tensor:
        """(k,) s_i . vector by slot, in float64."""
        return self._s[: self.count].mv(vector).double()

    def _extend_inverse(self, slot: int, column: Tensor, curvature: float) -> None:
        """Make a new pair the last row and column of R, in place of the oldest pair.

        The inverse of a triangular matrix holds that of every trailing block, so the
        oldest pair leaves by its row and column alone; and with d the new diagonal
        entry and c the column above it, the new column of the inverse is -(R^-1 c) / d
        above 1 / d.

        Args:
            slot: Of the new pair, and of the oldest if the memory was full.
            column: (k,) float64, s_i . y of the new pair, by slot; overwritten.
            curvature: s . y of the new pair, d.
        """
        k, inverse = self.count, self._inverse
        self._curvatures[slot] = self._newest = curvature
        # Times zero goes the oldest pair's column, its row by hand.
        column[slot] = 0.0
        inverse[slot].zero_()
        above = inverse[:k, :k].mv(column)
        above[slot] = -1.0
        torch.mul(above, -1.0 / curvature, out=inverse[:k, slot])

    def diagonal(self, scale: Tensor) -> Tensor:
        """A diagonal estimate of the inverse Hessian, up to a common factor.

        The geometric mean of ``scale`` and of sqrt(sum s_i^2 / sum y_i^2) per weight
        i, sums over the stored pairs: how far a weight moved per change of its own
        gradient. Either alone is worse on some problem; a floor under the second sum,
        relative to its mean, keeps weights without curvature finite.

        Args:
            scale: (n,) the base optimizer's diagonal, read only.

        Returns:
            (n,) new tensor, not negative.
        """
        floor = self._changed.mean().mul_(_CURVATURE_FLOOR)
        ratio = self._changed + floor.add_(torch.finfo(scale.dtype).tiny)
        torch.div(self._moved, ratio, out=ratio)
        return ratio.sqrt_().mul_(scale).sqrt_()

    def solve(
        self, gradient: Tensor, scale: Tensor, boost: float = 1.0, *, seen: bool = False
    ) -> Tensor:
        """H g, the L-BFGS inverse Hessian times a vector; ``seen`` if it is the one
        that the memory looks at.

        With S and Y the pairs as rows, R the triangle of S Y' in which no pair is older
        than the column's, D its diagonal, and H0 = gamma diag(scale), gamma = boost *
        s.y / y.(scale y) of the newest pair, the two loops of L-BFGS are

            a = R^-1 S g,   q = g - Y'a,   r = H0 q,   d = R^-T (D a - Y r),
            H g = r + S'd.

        The inverse of R is kept, so that pairs stay in their slots.

        Source: Nocedal 1980, Math. Comp. 35; the matrix form is that of Byrd, Nocedal
        and Schnabel 1994, Math. Programming 63. Differs: H0 is a diagonal that changes
        at every call, so Y H0 Y' is not kept.
        """
        k, dtype = self.count, gradient.dtype
        S, Y = self._s[:k], self._y[:k]
        inverse, curvatures = self._inverse[:k, :k], self._curvatures[:k]
        y = Y[(self.head - 1) % self.capacity]
        gamma = boost * self._newest / y.dot(scale * y)
        a = inverse.mv(self._seen[:k] if seen else self._project(gradient))
        q = torch.addmv(gradient, Y.t(), a.to(dtype), alpha=-1.0)
        r = q.mul_(scale).mul_(gamma)
        d = inverse.t().mv(a.mul_(curvatures).sub_(Y.mv(r)))
        return torch.addmv(r, S.t(), d.to(dtype))

    def clear(self) -> None:
        """Forget every pair; the buffers stay."""
        self.count = self.head = 0
        self._squares.zero_()
        self._inverse.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Pairs in memory and what was made of them, copied."""
        k = self.count
        return {
            "capacity": self.capacity,
            "head": self.head,
            "s": self._s[:k].clone(),
            "y": self._y[:k].clone(),
            "inverse": self._inverse[:k, :k].clone(),
            "curvatures": self._curvatures[:k].clone(),
            "newest": self._newest,
            "seen": self._seen[:k].clone(),
            "squares": self._squares.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing when it does not fit."""
        s, y, inverse = state["s"], state["y"], state["inverse"]
        k, head = int(s.shape[0]), int(state["head"])
        fits = (
            int(state["capacity"]) == self.capacity
            and 0 <= k <= self.capacity
            and head == (k if k < self.capacity else head) % self.capacity
            and s.shape == y.shape == (k, self.size)
            and inverse.shape == (k, k)
            and state["curvatures"].shape == state["seen"].shape == (k,)
            and state["squares"].shape == (2, self.size)
        )
        if not fits:
            raise CheckpointError(
                f"secant pairs of shape {tuple(s.shape)}, capacity {state['capacity']}:"
                f" must be (k, {self.size}) with capacity {self.capacity}. Load with "
                "the model and configuration that the checkpoint was saved with."
            )
        self._s[:k], self._y[:k] = s, y
        self._inverse.zero_()
        self._inverse[:k, :k] = inverse
        self._curvatures[:k] = state["curvatures"]
        self._newest = float(state["newest"])
        self._seen[:k] = state["seen"]
        self._squares.copy_(state["squares"])
        self.count, self.head = k, head
