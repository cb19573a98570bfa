"""ZeroRedundancyOptimizer as the base: hybrid tensors live in its outer state.

Its own state is sharded over ranks in an inner optimizer, and its ``state_dict`` and
``load_state_dict`` know only that one: on save the outer state is overwritten, on load
it is filled with what belongs inside. So hybrid tensors are carried around both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["is_zero", "keep_outer_state", "restore_outer_state"]


def is_zero(base: Optimizer) -> bool:
    """Whether the base is a ``ZeroRedundancyOptimizer``.

    By name: importing the class pulls in all of ``torch.distributed.optim``.
    """
    return any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(base).__mro__)


def keep_outer_state(
    base: Optimizer, saved: dict[str, Any], keys: Sequence[str]
) -> dict[str, Any]:
    """The base's state dict with the outer tensors under ``keys`` put back."""
    state = dict(saved["state"])
    for index, parameter in enumerate(_parameters(base)):
        outer = base.state.get(parameter) or {}
        kept = {key: outer[key] for key in keys if key in outer}
        if kept:
            state[index] = {**(state.get(index) or {}), **kept}
    return {**saved, "state": state}


def restore_outer_state(
    base: Optimizer, saved: dict[str, Any], keys: Sequence[str]
) -> None:
    """Load ``saved`` into the base, tensors under ``keys`` outside, the rest inside.

    ``saved`` is not changed, although the base's own method writes into its argument.
    """
    inside = {
        index: {k: v for k, v in values.items() if k not in keys}
        for index, values in saved["state"].items()
    }
    base.load_state_dict({**saved, "state": inside})
    # What is outside now is a copy of what belongs inside, and None for the others.
    base.state.clear()
    for index, parameter in enumerate(_parameters(base)):
        values = saved["state"].get(index) or {}
        kept = {
            key: values[key].to(parameter.device, copy=True)
            for key in keys
            if key in values
        }
        if kept:
            base.state[parameter] = kept


def _parameters(base: Optimizer) -> list[Any]:
    return [p for group in base.param_groups for p in group["params"]]
