"""Real steps that are only glanced at: asleep or coasting, on one process.

Where moves have not paid for long, measuring every step would cost more than they win.
Most steps are then the base's own, behind one look at whether its input is finite: by
the host on a CPU, and on a GPU by the device itself (``unseen.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hybridopt.kernels.finite import find_non_finite
from hybridopt.kernels.flat import dot, flat
from hybridopt.run import Run
from hybridopt.skipping import honours_found_inf
from hybridopt.types import BASIS_SIZE, Observation
from hybridopt.unseen import Look
from hybridopt.weights.local import local

__all__ = ["Glance", "glance", "look_on_device", "pass_by"]


@dataclass(frozen=True, slots=True)
class Glance:
    """What one look at a real step shows."""

    loss: float
    """nan when the user stepped without a closure, or it stays on the device."""
    gradient_norm: float
    rate: float
    """The step's largest learning rate."""


def glance(run: Run, loss: Tensor | float | None) -> Glance | None:
    """Look whether loss and gradient are finite; None if the step needs more than that.

    More is needed where numbers are on another device or another rank, where secant
    moves are under way, and where something is not finite.
    """
    if run.pending is not None or run.collective.world_size > 1 or _watches_secant(run):
        return None
    if isinstance(loss, Tensor) and loss.device.type != "cpu":
        return None
    gradients = []
    for parameter in run.space.parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if type(gradient) is not Tensor:
            gradient = local(gradient)
        if not gradient.is_cpu or gradient.layout is not torch.strided:
            return None
        gradients.append(gradient)
    value = math.nan if loss is None else float(loss)
    seen = Glance(value, _norm(gradients), run.top_rate())
    finite = math.isfinite(seen.gradient_norm) and math.isfinite(seen.rate)
    return seen if finite and (loss is None or math.isfinite(value)) else None


def look_on_device(run: Run, loss: Tensor | float | None) -> Look | None:
    """Let the device find out whether loss and gradient are finite; None if the step
    needs more than that.

    More is needed where ``skips_on_device`` was not true of the step that was measured
    last or gradients are of other parameters, and where every record is wanted with its
    numbers.
    """
    if run.sink.active or run.collective.world_size > 1 or _watches_secant(run):
        return None
    if run.controller.plan.horizon > 0 or hasattr(run.base, "found_inf"):
        return None
    if not honours_found_inf(run.base):
        return None
    rate, device = run.top_rate(), run.device
    found = [(p, p.grad) for p in run.space.parameters()]
    parameters = [p for p, gradient in found if gradient is not None]
    gradients = [gradient for _, gradient in found if gradient is not None]
    if not (math.isfinite(rate) and gradients and run.unseen.expects(parameters)):
        return None
    if not all(map(_is_plain, gradients)):
        return None
    if isinstance(loss, Tensor) and loss.device == device:
        loss = loss.detach().to(torch.float32, copy=True)
        return Look(find_non_finite([*gradients, loss], device), loss, rate)
    value = math.nan if loss is None else float(loss)
    if loss is not None and not math.isfinite(value):
        return None
    return Look(find_non_finite(gradients, device), value, rate)


def _is_plain(gradient: Tensor) -> bool:
    """Whether the pass that looks for what is not finite can write every element back:
    not into expanded ones, which users may set, or those made in inference mode.
    """
    return (
        type(gradient) is Tensor
        and gradient.layout is torch.strided
        and gradient.is_floating_point()
        and (gradient.is_contiguous() or 0 not in gradient.stride())
        and not gradient.is_inference()
    )


def pass_by(run: Run, seen: Glance, *, before_turn: bool = False) -> None:
    """Count a step that was only glanced at; the base has stepped.

    Coasting, the drift window has to know of it.

    Args:
        run: Changed.
        seen: What is known of the step.
        before_turn: Whether the drift window turns behind it.
    """
    run.counters.real_steps += 1
    rate = seen.rate
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
                before_turn=before_turn,
            )
        )
    run.controller.advance_real(rate, planned=run.controller.plan.horizon > 0)
    run.monitor.real_step()
    if math.isfinite(seen.loss):
        run.last_loss = seen.loss


FEW = 32
"""Tensors up to which one product each costs less than the foreach way."""


def _norm(gradients: list[Tensor]) -> float:
    """Norm of all of them. ``torch.nn.utils.get_total_norm`` sorts them by device and
    kind first, which takes as long as the norm itself where tensors are small.
    """
    if len(gradients) > FEW or not all([g.is_floating_point() for g in gradients]):
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(gradients))
            return float(torch.linalg.vector_norm(norms))
    # Nothing else in a step takes so little to get at the numbers.
    vectors = [flat(g, g.dtype) for g in gradients]
    square = sum([dot(v, v).item() for v in vectors])
    return math.sqrt(square) if square >= 0.0 else math.nan


@lru_cache(maxsize=4)
def _nothing(size: int) -> Tensor:
    """(size, J) zeros, not to be changed."""
    return torch.zeros(size, BASIS_SIZE, dtype=torch.float64, device="cpu")


def _watches_secant(run: Run) -> bool:
    """Whether the secant mover wants to see this step."""
    return not (run.secant is None or run.secant_off or run.decays) and run.noise.is_low
