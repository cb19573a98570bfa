"""The text of each kernel and the options that specialize it; no device needed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import torch

from hybridopt.kernels.layout import FORMATS, pack_size

__all__ = ["STREAMING", "UNROLL", "kernel_options", "kernel_source"]

UNROLL = {
    "observe": 4,
    "advance": 4,
    "apply": 4,
    "copy": 4,
    "lead": 4,
    "base": 4,
    "plan": 1,
}
"""Packs in flight per thread, by kernel file (chosen by ``benchmarks.kernels``)."""
STREAMING = {
    "observe": 1,
    "advance": 0,
    "apply": 1,
    "copy": 0,
    "lead": 0,
    "base": 0,
    "plan": 0,
}
"""1 where accesses are marked as read or written once, by kernel file."""


def kernel_source(name: str) -> str:
    """The full text of one kernel file: what all share, then the file itself."""
    folder = resources.files("hybridopt.kernels") / "source"
    parts = [
        (folder / part).read_text("utf-8") for part in ("common.cuh", f"{name}.cu")
    ]
    return "\n".join(parts)


def kernel_options(
    name: str, roles: Sequence[torch.dtype], directions: int, adamw: bool = False
) -> tuple[str, ...]:
    """Compiler options that specialize a kernel file.

    Args:
        name: File in ``source`` without its suffix.
        roles: Formats of weights, gradients and directions, in this order.
        directions: J; for ``advance`` 1 where it makes the move along s as well, for
            ``lead`` 1 where it moves weights at all.
        adamw: Which base ``base.cu`` is; the other files ignore it.
    """
    param, grad, basis = (FORMATS[r] for r in roles)
    return (
        "-std=c++17",
        f"-DPARAM={param}",
        f"-DGRAD={grad}",
        f"-DBASIS={basis}",
        f"-DPACK={pack_size(roles)}",
        f"-DDIRECTIONS={directions}",
        f"-DBASE_ADAMW={int(adamw)}",
        f"-DUNROLL={UNROLL[name]}",
        f"-DSTREAMING={STREAMING[name]}",
    )
