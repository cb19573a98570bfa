"""Running the user's closure: forward or classic form, for real or forward-only.

A *forward closure* computes and returns the loss; a *classic closure* (the torch
convention) also clears gradients and calls backward. Which one it is shows on a real
step: gradients are cleared before the call and found set after it.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridopt.errors import ClosureError

__all__ = [
    "Closure",
    "Evaluation",
    "call_as_is",
    "evaluate",
    "forward_only",
    "insists_on_call",
    "quiet_forward",
    "require_callable",
    "requires_closure",
]

Closure = Callable[[], Any]

_EXAMPLE = "Return the loss: opt.step(lambda: F.cross_entropy(model(x), y))."


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a closure gave on a real step; gradients are in ``p.grad``."""

    result: Any
    """What the closure returned, as is."""
    loss: Tensor | float | None
    """The same as a number, where it is one."""
    forward_form: bool
    """True for a forward closure, False for a classic one."""


def evaluate(
    closure: Callable[[], Any], parameters: Sequence[Tensor], clip: float | None
) -> Evaluation:
    """Call the closure once and see to it that gradients exist.

    Raises:
        ClosureError: No gradients, and nothing to call backward on.
    """
    for parameter in parameters:
        parameter.grad = None
    with torch.enable_grad():
        result = closure()
        if any(p.grad is not None for p in parameters):
            return Evaluation(result, _number(result), forward_form=False)
        _require_loss(result)
        result.backward()
    if not any(p.grad is not None for p in parameters):
        raise ClosureError(
            f"closure returned a loss of shape {tuple(result.shape)} that reaches no "
            "parameter of this optimizer. Compute it with the model whose parameters "
            f"were passed to the base optimizer. {_EXAMPLE}"
        )
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(
            [p for p in parameters if p.grad is not None], clip
        )
    # The graph is used up; handing it on would only keep its memory alive.
    loss = result.detach()
    return Evaluation(loss, loss, forward_form=True)


def require_callable(closure: Any) -> None:
    """Refuse what is neither a closure nor None.

    Raises:
        ClosureError: It cannot be called.
    """
    if closure is not None and not callable(closure):
        raise ClosureError(
            f"closure={closure!r} of type {type(closure).__name__}: must be "
            "callable. Pass a function that returns the loss: "
            "opt.step(lambda: F.cross_entropy(model(x), y))."
        )


def call_as_is(closure: Callable[[], Any]) -> Evaluation:
    """Call a framework's own closure once, and leave gradients to it.

    It clears them itself where it wants to: before the first micro-batch of an
    accumulated step, not before the last, which is the one that arrives here.
    """
    with torch.enable_grad():
        result = closure()
    return Evaluation(result, _number(result), forward_form=False)


def _number(result: Any) -> Tensor | float | None:
    """The loss in a classic closure's result, if there is one."""
    if isinstance(result, Tensor) and result.numel() == 1:
        return result.detach()
    return float(result) if isinstance(result, (int, float)) else None


def _require_loss(result: Any) -> None:
    if not isinstance(result, Tensor):
        raise ClosureError(
            f"closure returned {result!r} of type {type(result).__name__} and left no "
            f"gradients: must return a scalar loss tensor. {_EXAMPLE}"
        )
    if result.numel() != 1:
        raise ClosureError(
            f"closure returned a tensor of shape {tuple(result.shape)}: must be a "
            f"scalar. Reduce it, for example with .mean(). {_EXAMPLE}"
        )
    if not result.requires_grad:
        raise ClosureError(
            f"closure returned a loss of {float(result):.4g} without a graph and left "
            "no gradients: backward cannot run. Do not detach it, do not call .item(), "
            f"and compute it outside torch.no_grad(). {_EXAMPLE}"
        )


def forward_only(closure: Callable[[], Any], model: nn.Module) -> float:
    """Loss of a forward closure under ``no_grad``, leaving no trace.

    Buffers (BatchNorm statistics) and the user's random streams are as before.

    Raises:
        ClosureError: The closure returned no scalar, or ran backward itself.
    """
    try:
        with torch.no_grad(), quiet_forward(model):
            result = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ClosureError(
            "closure ran backward in a forward-only validation, which the closures "
            "before it allowed: the closures of one run must all return the loss or "
            "all run backward. Keep to one form, or set validation_interval=0."
        ) from error
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise ClosureError(
            f"closure returned {result!r} in a forward-only validation: must be a "
            f"scalar loss tensor. {_EXAMPLE}"
        )
    return float(result)


@contextmanager
def quiet_forward(model: nn.Module) -> Iterator[None]:
    """Buffers of ``model`` and all global random streams are the same afterwards."""
    buffers = [b for b in model.buffers()]
    kept = [b.clone() for b in buffers]
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)


def insists_on_call(closure: Callable[[], Any]) -> bool:
    """Whether the closure belongs to a framework that fails when it is not called.

    Lightning's automatic optimization passes a partial of its own and raises
    MisconfigurationException when it did not run. Other code can set the attribute
    ``hybridopt_always_call`` on its closure.
    """
    if getattr(closure, "hybridopt_always_call", False):
        return True
    function = closure.func if isinstance(closure, functools.partial) else closure
    module = getattr(function, "__module__", None) or ""
    return module.startswith(("lightning.", "pytorch_lightning."))


def requires_closure(base: torch.optim.Optimizer) -> bool:
    """Whether the base's step cannot do without a closure (LBFGS)."""
    parameter = inspect.signature(type(base).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
