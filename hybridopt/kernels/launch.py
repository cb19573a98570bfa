"""Launching kernels: streams, compiled variants and address tables of one device.

CuPy is handed in, so that ``cupy_ops`` stays its only importer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridopt.kernels.compilation import kernel_options, kernel_source
from hybridopt.kernels.layout import Group, Layout, build_layout

__all__ = ["Launcher", "Table"]

_THREADS = 256
_FILL_WORDS = 440
"""Table words per ``fill`` launch: what fits into 4 KiB of kernel arguments."""
_TABLES = 64
"""Tables kept; a training loop uses a few, one per set of addresses."""


@dataclass(frozen=True, slots=True)
class Table:
    """A layout in device memory."""

    layout: Layout
    words: Tensor
    owner: Tensor

    def head(self) -> tuple[int, ...]:
        """What ``own``, ``total`` and ``verdict`` take first."""
        layout = self.layout
        return (self.words.data_ptr(), layout.lists, layout.tensors, layout.chunks)


class _StreamPointer:
    """A torch stream as the CUDA stream protocol wants it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.pointer)


class Launcher:
    """Compiles, caches and launches on torch's current stream of one device."""

    def __init__(self, cupy: Any, device: torch.device) -> None:
        import numpy  # CuPy depends on it, so it is there when this runs.

        self._cupy, self._numpy = cupy, numpy
        self.device = device
        self.chunk_size: int | None = None
        """Weights per chunk; None: by the size of the call."""
        self._tables: OrderedDict[Any, Table] = OrderedDict()
        self._kernels: dict[Any, Any] = {}
        self._streams: dict[int, Any] = {}

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        """Make torch's device and stream CuPy's too; yields the stream's address."""
        with torch.cuda.device(self.device):
            pointer = torch.cuda.current_stream(self.device).cuda_stream
            stream = self._streams.get(pointer)
            if stream is None:
                stream = self._streams[pointer] = self._wrap(pointer)
            with stream:
                yield pointer

    def capturing(self) -> bool:
        """Whether launches go into a CUDA graph instead of onto the device."""
        return torch.cuda.is_current_stream_capturing()

    def floats(self, *shape: int) -> Tensor:
        """Uninitialized float32 from torch's allocator."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def number(self, value: float) -> Any:
        """A float kernel argument."""
        return self._numpy.float32(value)

    def factors(self, coefficients: Tensor) -> Tensor:
        """Coefficients as the kernels read them: contiguous float32 on the device."""
        return coefficients.detach().to(self.device, torch.float32).contiguous()

    def table(
        self,
        stream: int,
        lists: Sequence[Sequence[Tensor]],
        same: Sequence[tuple[int, int]] = (),
    ) -> Table | None:
        """The address table of a call, or None if the kernels cannot serve it.

        Tables are kept per stream, since nothing but stream order makes their contents
        visible. Inside a graph capture none is looked up or kept: the fill becomes part
        of the graph, whose memory pool then owns the table.

        Args:
            stream: Address of the current stream.
            lists: One list of tensors per operand.
            same: Pairs of operands that must have equal formats.
        """
        if self.capturing():
            return self._build(lists, same)
        prints = [_fingerprint(tensors) for tensors in lists]
        key = (stream, self.chunk_size, tuple(same), *prints)
        table = self._tables.get(key)
        if table is None:
            table = self._build(lists, same)
            # Strides are not part of a fingerprint, so only contiguous calls are kept.
            if table is not None and all(p[-1] for p in prints):
                self._tables[key] = table
                if len(self._tables) > _TABLES:
                    self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
        return table

    def sweep(
        self, name: str, table: Table, group: Group, variant: Sequence[Any], *args: Any
    ) -> None:
        """Launch a kernel over one group's chunks.

        Args:
            name: ``file`` or ``file.kernel``.
            table: Its words, owners and chunk size go first in the arguments.
            group: Chunks to cover.
            variant: Arguments of ``kernel_options`` behind the name.
            args: The kernel's own further arguments.
        """
        layout = table.layout
        head = (
            table.words.data_ptr(),
            layout.tensors,
            table.owner.data_ptr(),
            group.first_chunk,
            layout.chunk_size,
        )
        kernel = self._kernel(name, tuple(variant))
        kernel((group.chunks,), (_THREADS,), (*head, *args))

    def total(self, table: Table, partials: Tensor, width: int, result: Tensor) -> None:
        """Add up the partial sums of each tensor's chunks into its row."""
        args = (*table.head(), partials.data_ptr(), width, result.data_ptr())
        if table.layout.tensors:
            self._plan("total")((table.layout.tensors,), (_THREADS,), args)

    def verdict(self, table: Table, partials: Tensor, result: Tensor) -> None:
        """Norms per tensor and the flag behind them, from what ``judge`` found."""
        args = (*table.head(), partials.data_ptr(), result.data_ptr())
        self._plan("verdict")((table.layout.tensors + 1,), (1024,), args)

    def _build(
        self, lists: Sequence[Sequence[Tensor]], same: Sequence[tuple[int, int]]
    ) -> Table | None:
        if any(t.device != self.device for tensors in lists for t in tensors):
            return None
        layout = build_layout(lists, self.chunk_size)
        if layout is None:
            return None
        if any(g.formats[a] != g.formats[b] for g in layout.groups for a, b in same):
            return None
        words = torch.empty(len(layout.words), dtype=torch.int64, device=self.device)
        owner = torch.empty(layout.chunks, dtype=torch.int32, device=self.device)
        fill = self._plan("fill")
        for start in range(0, len(layout.words), _FILL_WORDS):
            part = layout.words[start : start + _FILL_WORDS]
            held = self._numpy.zeros(1, dtype=[("at", "i8", (_FILL_WORDS,))])
            held["at"][0, : len(part)] = part
            to = words.data_ptr() + 8 * start
            fill((1,), (_THREADS,), (to, len(part), held))
        table = Table(layout, words, owner)
        if layout.tensors:
            args = (*table.head(), owner.data_ptr())
            self._plan("own")((layout.tensors,), (_THREADS,), args)
        return table

    def _plan(self, name: str) -> Any:
        return self._kernel(f"plan.{name}", ((torch.float32,) * 3, 0))

    def _kernel(self, name: str, variant: tuple[Any, ...]) -> Any:
        """A compiled kernel; CuPy keeps the binary on disk between processes."""
        kernel = self._kernels.get((name, variant))
        if kernel is None:
            file, _, function = name.partition(".")
            module = self._kernels.get((file, variant, "module"))
            if module is None:
                module = self._cupy.RawModule(
                    code=kernel_source(file), options=kernel_options(file, *variant)
                )
                self._kernels[file, variant, "module"] = module
            kernel = module.get_function(function or file)
            self._kernels[name, variant] = kernel
        return kernel

    def _wrap(self, pointer: int) -> Any:
        cuda = self._cupy.cuda
        if pointer == 0:
            return cuda.Stream.null
        if hasattr(cuda.Stream, "from_external"):
            return cuda.Stream.from_external(_StreamPointer(pointer))
        return cuda.ExternalStream(pointer, self.device.index)


def _fingerprint(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a table depends on: addresses, sizes, formats, and whether contiguous."""
    return (
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.numel, tensors)),
        tuple([t.dtype for t in tensors]),
        all(map(Tensor.is_contiguous, tensors)),
    )
