"""Where the numbers are: the table that lets one launch run over all tensors.

A launch covers every tensor whose operands have the same formats. Tensors are cut into
chunks of equal size, one block per chunk; a table in device memory tells a block which
tensor its chunk belongs to and where that tensor's operands are. Pure host code, so it
is tested without a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "Group", "Layout", "build_layout", "pack_size"]

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Formats that the kernels read and write, by the name they have in the source."""

_CHUNKS = ((1 << 24, 4096), (1 << 28, 16384), (1 << 62, 32768))
"""Chunk size by the number of weights up to which it is used: small models need many
chunks to fill the device, large ones few, since each costs a look-up and some sums."""


@dataclass(frozen=True, slots=True)
class Group:
    """A run of chunks that one launch covers."""

    formats: tuple[torch.dtype, ...]
    """dtype per list."""
    first_chunk: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The table of one call.

    Tensors are numbered by group; ``words`` holds one address per list and tensor, then
    per tensor its number of weights, its first chunk and its row in the caller's order.
    """

    words: tuple[int, ...]
    lists: int
    tensors: int
    chunks: int
    chunk_size: int
    groups: tuple[Group, ...]


def pack_size(formats: Sequence[torch.dtype]) -> int:
    """Weights per access: 16 bytes of the widest format."""
    return 16 // max(f.itemsize for f in formats)


def build_layout(
    lists: Sequence[Sequence[Tensor]], chunk_size: int | None = None
) -> Layout | None:
    """Lay out one call, or None if the kernels cannot serve it.

    They need formats of ``FORMATS``, one device, and operands whose elements lie in the
    same order: all contiguous, or dense with the same strides.

    Args:
        lists: One list of L tensors per operand, equal shapes across operands.
        chunk_size: Weights per chunk, a multiple of 8; chosen by total size if None.
    """
    rows = list(zip(*lists, strict=True))
    if not all(_served(row) for row in rows):
        return None
    keys = [tuple(t.dtype for t in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: [FORMATS[f] for f in keys[i]])
    sizes = [lists[0][i].numel() for i in order]
    if chunk_size is None:
        chunk_size = next(size for below, size in _CHUNKS if sum(sizes) <= below)
    first, chunks = [], 0
    groups: list[Group] = []
    for index, size in zip(order, sizes, strict=True):
        count = -(-size // chunk_size)
        if groups and groups[-1].formats == keys[index]:
            last = groups.pop()
            groups.append(Group(last.formats, last.first_chunk, last.chunks + count))
        else:
            groups.append(Group(keys[index], chunks, count))
        first.append(chunks)
        chunks += count
    addresses = [tensors[i].data_ptr() for tensors in lists for i in order]
    return Layout(
        words=(*addresses, *sizes, *first, *order),
        lists=len(lists),
        tensors=len(rows),
        chunks=chunks,
        chunk_size=chunk_size,
        groups=tuple(g for g in groups if g.chunks),
    )


def _served(row: Sequence[Tensor]) -> bool:
    """Whether one tensor's operands can be walked together, address by address."""
    first = row[0]
    if any(t.dtype not in FORMATS or t.device != first.device for t in row):
        return False
    if any(t.shape != first.shape for t in row):
        return False
    if all(t.is_contiguous() for t in row):
        return True
    return all(t.stride() == first.stride() for t in row) and _dense(first)


def _dense(tensor: Tensor) -> bool:
    """Whether a strided tensor covers numel() addresses, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
