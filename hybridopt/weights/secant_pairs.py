"""The newest secant pairs and the inverse Hessian that they imply (L-BFGS).

A pair (s, y) is a displacement and the change of the gradient over it, so y ~ B s with
B the Hessian. Real steps give pairs for free.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hybridopt.errors import CheckpointError

__all__ = ["PairMemory"]


class PairMemory:
    """A ring of secant pairs that applies the L-BFGS inverse Hessian in four passes.

    Pairs are kept divided by ||s||, which leaves L-BFGS unchanged (it is invariant to
    the scale of a pair) and keeps the triangular systems below well scaled.

    Attributes:
        capacity: m, the most pairs kept.
        count: Pairs in memory.
        head: Slot that the next pair is written to; the oldest one's once full.

    Memory: 2 m n in the parameters' dtype and m^2 in float64.
    """

    def __init__(
        self, capacity: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.count = 0
        self.head = 0
        self._s = torch.zeros(capacity, size, dtype=dtype, device=device)
        self._y = torch.zeros(capacity, size, dtype=dtype, device=device)
        # Entry (i, j) is s_i . y_j in slot order, valid where j is not older than i.
        self._products = torch.zeros(
            capacity, capacity, dtype=torch.float64, device=device
        )

    @property
    def size(self) -> int:
        """n, the length of the vectors."""
        return self._s.shape[1]

    def add(self, s: Tensor, y: Tensor, minimum_curvature: float) -> bool:
        """Keep a pair, in place of the oldest when full, if s.y > c ||s|| ||y||.

        Args:
            s: (n,) displacement; read only.
            y: (n,) change of the gradient over it; read only.
            minimum_curvature: c, which keeps the inverse Hessian positive definite.

        Returns:
            Whether the pair was kept; False for pairs that are not finite.

        Cost: one pass over the stored displacements, one copy of 3 numbers to the host.
        """
        sy, ss, yy = torch.stack([s @ y, s @ s, y @ y]).tolist()
        if not (math.isfinite(yy) and ss > 0.0 and yy > 0.0):
            return False
        if not sy > minimum_curvature * math.sqrt(ss) * math.sqrt(yy):
            return False
        slot, scale = self.head, 1.0 / math.sqrt(ss)
        if not math.isfinite(scale):
            return False
        torch.mul(s, scale, out=self._s[slot])
        torch.mul(y, scale, out=self._y[slot])
        self.count = min(self.count + 1, self.capacity)
        self.head = (slot + 1) % self.capacity
        self._products[: self.count, slot] = self._s[: self.count] @ self._y[slot]
        return True

    def solve(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """H g, the L-BFGS inverse Hessian times a vector.

        With S and Y the pairs as rows, oldest first, R the upper triangle of S Y',
        D its diagonal, and H0 = gamma diag(scale), gamma = s.y / y.(scale y) of the
        newest pair, the two loops of L-BFGS are two triangular systems:

            R a = S g,   q = g - Y'a,   r = H0 q,   R'd = D a - Y r,   H g = r + S'd.

        Args:
            gradient: (n,), read only.
            scale: (n,) positive diagonal, read only.

        Returns:
            (n,) new tensor; all zero times the gradient when there are no pairs is
            never returned: call it with ``count`` >= 1 only.

        Cost: two passes over S, two over Y; about 20 tensor operations whatever m is.

        Source: Nocedal 1980, Math. Comp. 35; the matrix form is that of Byrd, Nocedal
        and Schnabel 1994, Math. Programming 63. Differs: H0 is a diagonal that changes
        at every call, so Y H0 Y' is not kept.
        """
        k = self.count
        S, Y = self._s[:k], self._y[:k]
        newest = self._y[(self.head - 1) % self.capacity]
        slot = (self.head - 1) % self.capacity
        gamma = self._products[slot, slot] / (newest @ (scale * newest))
        shift = -self.head if k == self.capacity else 0
        R = self._products[:k, :k]
        if shift:
            R = R.roll((shift, shift), (0, 1))
        R = R.triu()
        right = (S @ gradient).double().roll(shift).unsqueeze(1)
        a = torch.linalg.solve_triangular(R, right, upper=True)
        q = torch.addmv(gradient, Y.T, self._slots(a, shift), alpha=-1.0)
        r = q.mul_(scale).mul_(gamma.to(q.dtype))
        right = R.diagonal().unsqueeze(1) * a
        right = right - (Y @ r).double().roll(shift).unsqueeze(1)
        d = torch.linalg.solve_triangular(R.T, right, upper=False)
        return torch.addmv(r, S.T, self._slots(d, shift))

    def _slots(self, values: Tensor, shift: int) -> Tensor:
        """(k, 1) float64 by age back to (k,) by slot, in the vectors' dtype."""
        return values.squeeze(1).roll(-shift).to(self._s.dtype)

    def clear(self) -> None:
        """Forget every pair; the buffers stay."""
        self.count = self.head = 0

    def state_dict(self) -> dict[str, Any]:
        """Pairs in memory and their products, copied."""
        k = self.count
        return {
            "capacity": self.capacity,
            "head": self.head,
            "s": self._s[:k].clone(),
            "y": self._y[:k].clone(),
            "products": self._products[:k, :k].clone(),
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
        )
        if not fits:
            raise CheckpointError(
                f"secant pairs of shape {tuple(s.shape)}, capacity {state['capacity']}:"
                f" must be (k, {self.size}) with capacity {self.capacity}. Load with "
                "the model and configuration that the checkpoint was saved with."
            )
        self._s[:k], self._y[:k] = s, y
        self._products[:k, :k] = products
        self.count, self.head = k, head
