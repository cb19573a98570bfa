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
    the scale of a pair) and keeps the triangular systems below well scaled.

    Attributes:
        capacity: m, the most pairs kept.
        count: Pairs in memory.
        head: Slot that the next pair is written to; the oldest one's once full.

    Memory: 2 (m + 1) n in the parameters' dtype and 4 m^2 in float64.
    """

    def __init__(
        self, capacity: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.count = 0
        self.head = 0
        self._pairs = torch.zeros(2, capacity, size, dtype=dtype, device=device)
        self._s, self._y = self._pairs
        # Sums over the stored pairs of s^2 and y^2, per weight.
        self._squares = torch.zeros(2, size, dtype=dtype, device=device)
        # Entry (i, j) is s_i . y_j, oldest pair first, valid where j is not older than
        # i. The pairs' block slides down the diagonal of a matrix of twice their
        # number, so that dropping the oldest moves nothing; at its end it goes back.
        self._products = torch.zeros(
            2 * capacity, 2 * capacity, dtype=torch.float64, device=device
        )
        self._first = 0

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
    ) -> bool:
        """Keep a pair, in place of the oldest when full, if s.y > c ||s|| ||y||.

        Args:
            s: (n,) displacement; read only.
            y: (n,) change of the gradient over it; read only.
            minimum_curvature: c, which keeps the inverse Hessian positive definite.
            sizes: s.y, ||s||^2 and ||y||^2, if they are known.

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
        if full:
            self._drop_oldest()
        column = self._aged(self._s[: self.count] @ pair[1])
        end = self._first + self.count
        self._products[self._first : end, end - 1] = column
        if self.head == 0:
            # Subtracting pairs leaves rounding behind: start afresh once per round.
            torch.sum(self._pairs * self._pairs, 1, out=self._squares)
        elif full:
            self._squares.clamp_min_(0.0)
        return True

    @property
    def products(self) -> Tensor:
        """(k, k) view of s_i . y_j, oldest pair first; the upper triangle is valid."""
        block = slice(self._first, self._first + self.count)
        return self._products[block, block]

    def _drop_oldest(self) -> None:
        """Make room for one more row and column of products."""
        if self._first + self.capacity < 2 * self.capacity:
            self._first += 1
            return
        kept = slice(self._first + 1, 2 * self.capacity)
        block = self._products[kept, kept].clone()
        self._first, count = 0, self.capacity - 1
        self._products[:count, :count] = block

    def _aged(self, values: Tensor) -> Tensor:
        """(k,) by slot to (k,) by age, oldest first."""
        if self.count < self.capacity or self.head == 0:
            return values
        return torch.cat((values[self.head :], values[: self.head]))

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
        moved, changed = self._squares
        floor = _CURVATURE_FLOOR * changed.mean() + torch.finfo(scale.dtype).tiny
        ratio = changed + floor
        torch.div(moved, ratio, out=ratio)
        return ratio.sqrt_().mul_(scale).sqrt_()

    def solve(self, gradient: Tensor, scale: Tensor, boost: float = 1.0) -> Tensor:
        """H g, the L-BFGS inverse Hessian times a vector.

        With S and Y the pairs as rows, oldest first, R the upper triangle of S Y',
        D its diagonal, and H0 = gamma diag(scale), gamma = boost * s.y / y.(scale y) of
        the newest pair, the two loops of L-BFGS are two triangular systems:

            R a = S g,   q = g - Y'a,   r = H0 q,   R'd = D a - Y r,   H g = r + S'd.

        Args:
            gradient: (n,), read only.
            scale: (n,) diagonal, not negative, read only.
            boost: Factor on gamma.

        Returns:
            (n,) new tensor. Needs at least one pair.

        Cost: two passes over S, two over Y; about 20 tensor operations whatever m is.

        Source: Nocedal 1980, Math. Comp. 35; the matrix form is that of Byrd, Nocedal
        and Schnabel 1994, Math. Programming 63. Differs: H0 is a diagonal that changes
        at every call, so Y H0 Y' is not kept.
        """
        k = self.count
        S, Y = self._s[:k], self._y[:k]
        newest = self._y[(self.head - 1) % self.capacity]
        # Only its upper triangle is read.
        R = self.products
        diagonal = R.diagonal()
        gamma = boost * diagonal[-1] / (newest @ (scale * newest))
        right = self._aged(S @ gradient).double().unsqueeze(1)
        a = torch.linalg.solve_triangular(R, right, upper=True)
        q = torch.addmv(gradient, Y.T, self._slots(a), alpha=-1.0)
        r = q.mul_(scale).mul_(gamma.to(q.dtype))
        right = diagonal.unsqueeze(1) * a
        right -= self._aged(Y @ r).double().unsqueeze(1)
        d = torch.linalg.solve_triangular(R.T, right, upper=False)
        return torch.addmv(r, S.T, self._slots(d))

    def _slots(self, values: Tensor) -> Tensor:
        """(k, 1) float64 by age back to (k,) by slot, in the vectors' dtype."""
        flat = values.squeeze(1).to(self._s.dtype)
        if self.count < self.capacity or self.head == 0:
            return flat
        split = self.count - self.head
        return torch.cat((flat[split:], flat[:split]))

    def clear(self) -> None:
        """Forget every pair; the buffers stay."""
        self.count = self.head = self._first = 0
        self._squares.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Pairs in memory and their products, copied."""
        k = self.count
        return {
            "capacity": self.capacity,
            "head": self.head,
            "s": self._s[:k].clone(),
            "y": self._y[:k].clone(),
            "products": self.products.clone(),
            "squares": self._squares.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises CheckpointError and changes nothing when it does not fit."""
        s, y, products = state["s"], state["y"], state["products"]
        k, head = int(s.shape[0]), int(state["head"])
        fits = (
            int(state["capacity"]) == self.capacity
            and 0 <= k <= self.capacity
            and head == (k if k < self.capacity else head) % self.capacity
            and s.shape == y.shape == (k, self.size)
            and products.shape == (k, k)
            and state["squares"].shape == (2, self.size)
        )
        if not fits:
            raise CheckpointError(
                f"secant pairs of shape {tuple(s.shape)}, capacity {state['capacity']}:"
                f" must be (k, {self.size}) with capacity {self.capacity}. Load with "
                "the model and configuration that the checkpoint was saved with."
            )
        self._s[:k], self._y[:k] = s, y
        self._first = 0
        self._products[:k, :k] = products
        self._squares.copy_(state["squares"])
        self.count, self.head = k, head
