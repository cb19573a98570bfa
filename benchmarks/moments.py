"""What to do with Adam's moments when the weights have moved without a gradient.

hybridopt keeps them. These variants age them instead, from outside, as if the steps
that a move is worth had been taken: for the ablation only, since a rollback does not
take their change back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

__all__ = ["MomentsAfterMove"]

LONGEST = 16.0
"""Steps that one move ages the moments by at most."""


class MomentsAfterMove:
    """Steps as the hybrid does; behind each planned move of w base steps, per tensor:

    shrink:   m <- b1^w m                                (w steps without a gradient)
    advance:  m <- b1^w m + (1 - b1^w) g,
              v <- b2^w v + (1 - b2^w) g^2               (w steps with this gradient).
    """

    def __init__(self, hybrid: Any, kind: Literal["shrink", "advance"]) -> None:
        self.hybrid, self.kind = hybrid, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hybrid, name)

    def step(self, closure: Any) -> Any:
        """One step of the hybrid, then the moments."""
        result = self.hybrid.step(closure)
        record = self.hybrid.last_step
        moved = record is not None and record.mover.value == "gain"
        if moved and not record.loss_predicted and record.progress > 0.0:
            self._age(min(record.progress, LONGEST))
        return result

    @torch.no_grad()
    def _age(self, steps: float) -> None:
        for group in self.hybrid.param_groups:
            if "betas" not in group:
                continue
            first, second = (beta**steps for beta in group["betas"])
            for p in group["params"]:
                state = self.hybrid.state.get(p, {})
                if "exp_avg" not in state or p.grad is None:
                    continue
                if self.kind == "shrink":
                    state["exp_avg"].mul_(first)
                else:
                    state["exp_avg"].lerp_(p.grad, 1.0 - first)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 1.0 - second)
