"""The buffers of a module (BatchNorm statistics), looked up at every real step."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["list_buffers"]


def list_buffers(model: nn.Module) -> list[Tensor]:
    """``list(model.buffers())`` without the names, which cost most of its time."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if module._buffers:
            for buffer in module._buffers.values():
                if buffer is not None:
                    found.setdefault(id(buffer), buffer)
        if module._modules:
            waiting += reversed(list(module._modules.values()))
    return list(found.values())
