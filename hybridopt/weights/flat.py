"""Flat vectors: all parameters as one 1-d tensor, for movers that mix directions.

Order is the order of the list, each tensor in its logical (row-major) order whatever
its strides are. For small networks only: every flat vector is a full weight copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

__all__ = ["flatten", "flatten_gradients", "preconditioner", "set_flat_", "supports"]

_SMALLEST_EPS = 1e-16  # keeps the diagonal finite where an optimizer's eps is 0
# State keys under which optimizers keep the running mean of squared gradients; the
# first that is found is used (AMSGrad's maximum is what AMSGrad divides by).
_SQUARE_KEYS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")


def supports(parameters: Sequence[Tensor]) -> bool:
    """Whether the parameters can be one flat vector: plain dense tensors, all float32
    or all float64, on one CPU or CUDA device.
    """
    if not parameters:
        return False
    first = parameters[0]
    return (
        first.dtype in (torch.float32, torch.float64)
        and first.device.type in ("cpu", "cuda")
        and all(
            p.dtype == first.dtype
            and p.device == first.device
            and p.layout == torch.strided
            # Sharded tensors: inner products would need a sum over ranks.
            and not hasattr(p, "to_local")
            for p in parameters
        )
    )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A new (n,) tensor with all elements, detached; never a view of the input."""
    with torch.no_grad():
        flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
        # Of a single tensor that is a view.
        return flat.clone() if len(tensors) == 1 else flat


def flatten_gradients(parameters: Sequence[Tensor]) -> Tensor:
    """A new (n,) tensor with the gradients; zeros where a parameter has none."""
    gradients = [p.grad for p in parameters]
    return flatten(
        [
            p.new_zeros(p.shape) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )


@torch.no_grad()
def set_flat_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write a flat vector to the tensors.

    Raises:
        ValueError: The vector's length is not the number of elements; nothing was
            written.
    """
    size = sum([t.numel() for t in tensors])
    if flat.numel() != size:
        raise ValueError(
            f"flat vector of {flat.numel()} elements: must have {size}, the "
            "number of elements of the tensors. Flatten the same list of tensors."
        )
    pieces = _unflatten_dense_tensors(flat, tensors)  # type: ignore[no-untyped-call]
    torch._foreach_copy_(list(tensors), list(pieces))


@torch.no_grad()
def preconditioner(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> Tensor:
    """The diagonal by which the optimizer scales its steps, up to a common factor.

    rate_g / max rate * 1 / (sqrt(v_hat) + eps) with v_hat the bias-corrected running
    mean of squared gradients (Adam, AdamW, NAdam, RAdam; RMSprop without correction)
    and ``rate_g`` the learning rate of the parameter's group; without the square root
    term when some parameter that has a gradient has no such state (SGD). A group with
    learning rate 0 is 0.

    Args:
        optimizer: The base; read after its step, not changed.
        parameters: The list that flat vectors are made of, all of them the base's.

    Returns:
        (n,) in the parameters' dtype, finite for finite state.
    """
    # By id: hashing a tensor costs a call.
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    places = [groups[id(p)] for p in parameters]
    states = [optimizer.state.get(p, {}) for p in parameters]
    squares = [_square(s, p) for s, p in zip(states, parameters, strict=True)]
    if any(
        v is None and p.grad is not None
        for v, p in zip(squares, parameters, strict=True)
    ):
        squares = [None] * len(squares)
    flat = flatten(
        [
            torch.ones_like(p) if v is None else v if v.dtype is p.dtype else v.to(p)
            for v, p in zip(squares, parameters, strict=True)
        ]
    )
    scales = [
        (1.0, 0.0) if v is None else _correction(s, group)
        for v, s, group in zip(squares, states, places, strict=True)
    ]
    rates = [float(group["lr"]) for group in places]
    top = max(rates, default=0.0)
    ratios = [rate / top if top > 0.0 else 1.0 for rate in rates]
    # One pass over the flat vector when all tensors agree, which is the usual case;
    # per-tensor passes cost several times as much on small networks.
    if len(set(scales)) == 1:
        pieces, scales = [flat], scales[:1]
    else:
        pieces = list(flat.split_with_sizes([p.numel() for p in parameters]))
    for piece, (correction, eps) in zip(pieces, scales, strict=True):
        piece.div_(correction).sqrt_().add_(eps).reciprocal_()
    if min(ratios, default=1.0) < 1.0:
        split = flat.split_with_sizes([p.numel() for p in parameters])
        for piece, ratio in zip(split, ratios, strict=True):
            piece.mul_(ratio)
    return flat


def _square(state: Mapping[str, Any], parameter: Tensor) -> Tensor | None:
    """The optimizer's running mean of squared gradients, if it is kept elementwise."""
    for key in _SQUARE_KEYS:
        value = state.get(key)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return value
    return None


def _correction(
    state: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[float, float]:
    """1 - beta2^t (1 for optimizers that do not correct the bias) and epsilon."""
    eps = group.get("eps")
    eps = max(float(eps), _SMALLEST_EPS) if isinstance(eps, (int, float)) else 1e-8
    step = state.get("step")
    betas = group.get("betas")
    if step is None or not isinstance(betas, (tuple, list)):
        return 1.0, eps
    correction = 1.0 - float(betas[1]) ** float(step)
    return (correction if correction > 0.0 else 1.0), eps
