"""L-BFGS one iteration at a time, without paying twice for the accepted point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.wrapper import Closure

__all__ = ["IteratedLBFGS"]


class IteratedLBFGS:
    """``torch.optim.LBFGS`` (strong Wolfe), one quasi-Newton iteration per ``step``.

    torch evaluates the closure anew at the start of every ``step``, at the point that
    the last line search has already evaluated. Remembering the points of the last
    search gives that evaluation back for free, which is what a careful user of L-BFGS
    pays; without it the peer would look about a third slower than it is.
    """

    def __init__(self, model: nn.Module, *, history: int = 100) -> None:
        self.tensors = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.LBFGS(
            self.tensors,
            lr=1.0,
            max_iter=1,
            max_eval=25,
            history_size=history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        self._points: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self, closure: Closure) -> Tensor:
        """One iteration: a search direction and its line search."""
        remembered, self._points = self._points, []

        def cached() -> Tensor:
            weights = torch.cat([p.detach().reshape(-1) for p in self.tensors])
            known = next((p for p in remembered if torch.equal(p[0], weights)), None)
            if known is None:
                loss = closure().detach()
                gradient = torch.cat([_grad(p).reshape(-1) for p in self.tensors])
            else:
                _, loss, gradient = known
                self._set_gradient(gradient)
            self._points.append((weights, loss, gradient))
            return loss

        return self.optimizer.step(cached)  # type: ignore[no-any-return, arg-type]

    def _set_gradient(self, flat: Tensor) -> None:
        start = 0
        for p in self.tensors:
            p.grad = flat[start : start + p.numel()].view_as(p).clone()
            start += p.numel()


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad.detach()
