"""What ``benchmarks.kernels`` runs: model shapes, operands, calls and their traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hybridopt.kernels.fused import AdamWStep, BaseTensors, fused_move
from hybridopt.protocols import Ops
from hybridopt.weights.ahead import put_ahead

DEVICE = torch.device("cuda", 0)
HYPER = AdamWStep(1e-4, 0.9, 0.999, 1e-8, 0.1, 10)


def gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> list[Any]:
    """Parameter shapes of a GPT-2 of this size, embeddings tied."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,)]
        shapes += [(width, width), (width,), (width,), (width,)]
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*shapes, (width,), (width,)]


SIZES = {
    "5M": gpt_shapes(6, 256, 256, 256),
    "124M": gpt_shapes(12, 768, 50257, 1024),
    "1.5B": gpt_shapes(48, 1600, 50257, 1024),
}


@dataclass
class Operands:
    """One set of operands, every list in model order."""

    theta: list[Tensor]
    gradient: list[Tensor]
    anchor: list[Tensor]
    step: list[Tensor]
    lag: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    coefficients: Tensor


def operands(size: str, dtype: torch.dtype) -> Operands:
    """Random operands; moments positive where AdamW needs it."""

    def fill(kind: torch.dtype, factor: float) -> list[Tensor]:
        return [torch.randn(s, device=DEVICE, dtype=kind) * factor for s in SIZES[size]]

    direction = torch.bfloat16
    return Operands(
        fill(dtype, 0.02),
        fill(dtype, 1e-3),
        fill(dtype, 0.02),
        fill(direction, 1e-5),
        fill(direction, 1e-4),
        fill(dtype, 1e-3),
        [t.abs_() for t in fill(dtype, 1e-6)],
        torch.rand(len(SIZES[size]), 2, device=DEVICE) * 0.01,
    )


def cases(ops: Ops) -> dict[str, Callable[[Operands], object]]:
    """What is timed: one call per name."""
    return {
        "observe": lambda o: ops.observe(o.gradient, [o.step, o.lag]),
        "advance": lambda o: ops.advance(
            o.theta, o.gradient, o.anchor, o.step, o.lag, 0.97
        ),
        "apply": lambda o: ops.apply(o.theta, [o.step, o.lag], o.coefficients, 1e-3),
        "copy": lambda o: ops.copy(o.theta, o.anchor),
        "lead": lambda o: _lead(ops, o),
        "adamw+move": lambda o: fused_move(
            ops,
            BaseTensors(o.theta, o.gradient, o.first, o.second, [o.lag]),
            HYPER,
            o.coefficients,
            1e-3,
        ),
    }


def _lead(ops: Ops, o: Operands) -> None:
    bucket = SimpleNamespace(parameters=o.theta, leads=(o.lag, o.step))
    put_ahead(ops, [bucket], [o.anchor], 0, 1e-3, 1e-3)  # type: ignore[list-item]


def traffic(kernel: str, dtype: torch.dtype) -> int:
    """Bytes per weight that a kernel moves; directions are bf16 (2 bytes)."""
    p = dtype.itemsize
    return {
        "observe": p + 4,
        "advance": 4 * p + 6,  # reads theta g anchor v, writes anchor s v
        "apply": 2 * (p + 4) + p,  # judge reads, commit reads and writes
        "copy": 2 * p,
        "lead": 3 * p + 4,  # reads theta before p, writes theta s
        "adamw+move": 7 * p + 2,  # reads theta g m v b, writes theta m v
    }[kernel]


def operand_sets(size: str, dtype: torch.dtype) -> list[Operands]:
    """Enough sets to push each other out of the L2 cache."""
    weights = sum(torch.Size(s).numel() for s in SIZES[size])
    count = {True: 8, False: 2 if weights < 5e8 else 1}[weights < 5e7]
    return [operands(size, dtype) for _ in range(count)]
