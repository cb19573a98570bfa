"""Real steps that are only glanced at: asleep or coasting, on one process, on the CPU.

Where moves have not paid for long, measuring every step would cost more than they win.
Most steps are then the base's own, behind one look at whether its input is finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hybridopt.run import Run
from hybridopt.types import BASIS_SIZE, Observation
from hybridopt.weights.local import local

__all__ = ["Glance", "glance", "pass_by"]


@dataclass(frozen=True, slots=True)
class Glance:
    """What one look at a real step shows."""

    loss: float
    """nan when the user stepped without a closure."""
    gradient_norm: float


def glance(run: Run, loss: Tensor | float | None) -> Glance | None:
    """Look whether loss and gradient are finite; None if the step needs more than that.

    More is needed where numbers are on another device or another rank, where secant
    moves are under way, and where something is not finite.
    """
    if run.pending is not None or run.collective.world_size > 1 or _watches_secant(run):
        return None
    if isinstance(loss, Tensor) and loss.device.type != "cpu":
        return None
    gradients = [
        g if type(g) is Tensor else local(g)
        for p in run.space.parameters()
        if (g := p.grad) is not None
    ]
    if not all(g.is_cpu and g.layout is torch.strided for g in gradients):
        return None
    norm = _norm(gradients)
    value = math.nan if loss is None else float(loss)
    if not math.isfinite(norm) or not math.isfinite(run.top_rate()):
        return None
    if loss is not None and not math.isfinite(value):
        return None
    return Glance(value, norm)


def pass_by(run: Run, seen: Glance) -> None:
    """Count a step that was only glanced at; the base has stepped.

    Coasting, the drift window has to know of it.
    """
    run.counters.real_steps += 1
    rate = run.top_rate()
    if run.controller.coasting:
        nothing = _nothing(len(run.space.parameters()))
        run.predictor.observe(
            Observation(
                step=run.counters.steps,
                loss=seen.loss,
                gradient_norm=seen.gradient_norm,
                finite=True,
                gradient_sq=nothing[:, 0],
                dots=nothing,
                basis_sq=nothing,
                learning_rate=rate,
                lr_ratio=run.controller.lr_ratio(rate),
                slopes=nothing[:, 0],
                partial=True,
                drift_measured=False,
            )
        )
    run.controller.advance_real(rate)
    run.monitor.real_step()
    if math.isfinite(seen.loss):
        run.last_loss = seen.loss


def _norm(gradients: list[Tensor]) -> float:
    """Norm of all of them. ``torch.nn.utils.get_total_norm`` sorts them by device and
    kind first, which takes as long as the norm itself where tensors are small.
    """
    if not gradients:
        return 0.0
    with torch.no_grad():
        norms = torch.stack(torch._foreach_norm(gradients))
        return float(torch.linalg.vector_norm(norms))


@lru_cache(maxsize=4)
def _nothing(size: int) -> Tensor:
    """(size, J) zeros, not to be changed."""
    return torch.zeros(size, BASIS_SIZE, dtype=torch.float64, device="cpu")


def _watches_secant(run: Run) -> bool:
    """Whether the secant mover wants to see this step."""
    return not (run.secant is None or run.secant_off or run.decays) and run.noise.is_low
