"""Launching kernels: streams, compiled variants and address tables of one device.

CuPy is handed in, so that ``cupy_ops`` stays its only importer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridopt.kernels.compilation import kernel_options, kernel_source
from hybridopt.kernels.layout import Layout, build_layout
from hybridopt.kernels.recent import Fingerprints, Recent, Seen

__all__ = ["Launcher", "Table"]

_THREADS = 256
_FILL_WORDS = 440
"""Words per ``fill`` launch: what fits into 4 KiB of kernel arguments."""
_FILLED_FACTORS = 8 * _FILL_WORDS
"""Coefficients that still travel as kernel arguments, in four launches."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with what stays the same at every call with one table."""

    kernel: Any
    grid: tuple[int]
    block: tuple[int]
    head: tuple[int, ...]
    """First arguments."""

    def __call__(self, *args: Any) -> None:
        """Launch on CuPy's current stream."""
        self.kernel(self.grid, self.block, (*self.head, *args))


@dataclass(frozen=True, slots=True)
class Table:
    """A layout in device memory."""

    layout: Layout
    words: Tensor
    owner: Tensor
    held: list[int] = field(default_factory=list)
    """Numbers of the lists whose addresses it holds."""
    launches: dict[Any, tuple[Launch, ...]] = field(default_factory=dict)
    """What was launched with this table, by kernel and variant."""

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
        self._tables: Recent[Table] = Recent()
        self._prints = Fingerprints()
        self._kernels: dict[Any, Any] = {}
        self._streams: dict[int, Any] = {}
        self._argument = numpy.dtype([("at", "i8", (_FILL_WORDS,))])

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        """Make torch's device and stream CuPy's too; yields the stream's address."""
        current = torch.cuda.current_device() == self.device.index
        with nullcontext() if current else torch.cuda.device(self.device):
            pointer = torch.cuda.current_stream().cuda_stream
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
        plain = coefficients.detach().to(torch.float32).contiguous()
        if plain.device.type != "cpu":
            return plain.to(self.device)
        count = plain.numel()
        if count > _FILLED_FACTORS:
            # From pageable memory the copy would wait for everything queued before.
            pinned = plain.pin_memory() if self.device.type == "cuda" else plain
            return pinned.to(self.device, non_blocking=True)
        # Pinned memory would take the host three times as long.
        pairs = self._numpy.zeros(count + count % 2, dtype="f4")
        pairs[:count] = plain.reshape(-1).numpy()
        words = torch.empty(len(pairs) // 2, dtype=torch.int64, device=self.device)
        self._fill(words, 0, pairs.view("i8"))
        return words.view(torch.float32)[:count].view(plain.shape)

    def table(
        self,
        stream: int,
        lists: Sequence[Sequence[Tensor]],
        same: Sequence[tuple[int, int]] = (),
    ) -> Table | None:
        """The address table of a call, or None if the kernels cannot serve it.

        A table is kept per kind of lists: gradients come back in other memory at most
        steps, and then only their addresses are written anew. Tables are kept per
        stream, since nothing but stream order makes their contents visible, and keeps
        them unchanged until earlier launches have read them. Inside a graph capture
        none is looked up or kept: the fill becomes part of the graph, whose memory pool
        then owns the table.

        Args:
            stream: Address of the current stream.
            lists: One list of tensors per operand.
            same: Pairs of operands that must have equal formats.
        """
        if self.capturing():
            return self._build(lists, same)
        seen = [one for one in map(self._prints.look, lists) if one is not None]
        if len(seen) < len(lists):
            return self._build(lists, same)
        key = (stream, self.chunk_size, tuple(same), *(one.kind for one in seen))
        table = self._tables.get(key)
        if table is None:
            table = self._build(lists, same)
            if table is not None:
                table.held[:] = [one.number for one in seen]
                self._tables.put(key, table)
            return table
        for row, one in enumerate(seen):
            if table.held[row] != one.number:
                self._readdress(table, row, one)
        return table

    def _readdress(self, table: Table, row: int, seen: Seen) -> None:
        """Write one list's addresses into a table."""
        count = table.layout.tensors
        order = table.layout.words[len(table.layout.words) - count :]
        self._fill(table.words, row * count, [seen.addresses[i] for i in order])
        table.held[row] = seen.number

    def sweep(
        self,
        name: str,
        table: Table,
        roles: Sequence[int],
        variant: tuple[Any, ...],
        *args: Any,
    ) -> None:
        """Launch a kernel over all chunks: once per group.

        Args:
            name: ``file`` or ``file.kernel``.
            table: Its words, owners and chunk size go first in the arguments.
            roles: Operands that give weights, gradients and directions their formats.
            variant: Arguments of ``kernel_options`` behind the formats.
            args: The kernel's own further arguments.
        """
        launches = table.launches.get((name, variant))
        if launches is None:
            launches = self._sweeps(name, table, roles, variant)
            table.launches[name, variant] = launches
        for launch in launches:
            launch(*args)

    def total(self, table: Table, partials: Tensor, width: int, result: Tensor) -> None:
        """Add up the partial sums of each tensor's chunks into its row."""
        if table.layout.tensors:
            launch = self._summary("total", table, table.layout.tensors, _THREADS)
            launch(partials.data_ptr(), width, result.data_ptr())

    def verdict(self, table: Table, partials: Tensor, result: Tensor) -> None:
        """Norms per tensor and the flag behind them, from what ``judge`` found."""
        launch = self._summary("verdict", table, table.layout.tensors + 1, 1024)
        launch(partials.data_ptr(), result.data_ptr())

    def _sweeps(
        self,
        name: str,
        table: Table,
        roles: Sequence[int],
        variant: tuple[Any, ...],
    ) -> tuple[Launch, ...]:
        layout = table.layout
        words, owner = table.words.data_ptr(), table.owner.data_ptr()
        launches = []
        for group in layout.groups:
            formats = tuple(group.formats[role] for role in roles)
            head = (words, layout.tensors, owner, group.first_chunk, layout.chunk_size)
            kernel = self._kernel(name, (formats, *variant))
            launches.append(Launch(kernel, (group.chunks,), (_THREADS,), head))
        return tuple(launches)

    def _summary(self, name: str, table: Table, blocks: int, threads: int) -> Launch:
        found = table.launches.get(name)
        if found is None:
            kernel = self._plan(name)
            found = (Launch(kernel, (blocks,), (threads,), table.head()),)
            table.launches[name] = found
        return found[0]

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
        self._fill(words, 0, layout.words)
        table = Table(layout, words, owner)
        if layout.tensors:
            args = (*table.head(), owner.data_ptr())
            self._plan("own")((layout.tensors,), (_THREADS,), args)
        return table

    def _fill(self, words: Tensor, begin: int, values: Any) -> None:
        """Write int64 values, a sequence or an array, to ``words[begin:]``.

        They travel as kernel arguments: no host buffer has to stay alive.
        """
        fill = self._plan("fill")
        values = self._numpy.asarray(values, dtype="i8")
        for start in range(0, len(values), _FILL_WORDS):
            part = values[start : start + _FILL_WORDS]
            held = self._numpy.zeros(1, dtype=self._argument)
            held["at"][0, : len(part)] = part
            to = words.data_ptr() + 8 * (begin + start)
            fill((1,), (_THREADS,), (to, len(part), held))

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
