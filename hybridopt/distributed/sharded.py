"""FSDP2 (``fully_shard``): what a forward without a backward leaves behind."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["release_unsharded"]


def release_unsharded(model: nn.Module | None) -> None:
    """Drop gathered weights that a forward without a backward left on FSDP2 modules.

    FSDP2 keeps the root group gathered until the backward and reuses it in the next
    forward, so a change of the sharded weights in between would not be seen. Call it
    on every rank before the weights change; without FSDP2 modules it does nothing.
    Gradients that are being accumulated under ``set_requires_gradient_sync(False)`` are
    lost, as they are on any abandoned iteration.
    """
    if model is None:
        return
    # Whoever sharded the model has imported this module; importing it here would cost
    # everyone else a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        _release(model, kind)


def _release(module: nn.Module, kind: type) -> None:
    """Find the outermost FSDP2 modules: state hangs on roots, children follow."""
    if not isinstance(module, kind):
        for child in module.children():
            _release(child, kind)
        return
    root: Any = module
    if hasattr(root, "reset_iter_state"):
        # Before its first forward a module does not know that it is the root, and
        # holds nothing yet; resetting it then fails.
        if getattr(root._get_fsdp_state(), "_is_root", True) is None:
            return
        root.reset_iter_state()
        return
    shards: list[Any] = [m for m in module.modules() if isinstance(m, kind)]
    for shard in shards:  # older torch has no way to reset the root as a whole
        shard.reshard()
