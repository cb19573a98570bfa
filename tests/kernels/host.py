"""The CUDA kernels compiled for the host, behind the very code that launches them.

The same source text goes through g++ with a prelude that turns a launch into two loops.
``host_ops()`` is a ``CupyOps`` whose launcher runs those instead of CuPy's kernels, so
tables, variants, arguments and arithmetic are the shipped ones.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hybridopt.kernels.compilation import kernel_options, kernel_source
from hybridopt.kernels.cupy_ops import CupyOps
from hybridopt.kernels.launch import Launcher
from hybridopt.kernels.torch_ops import TorchOps

COMPILER = shutil.which("g++")
FOLDER = Path(tempfile.mkdtemp(prefix="hybridopt-kernels-"))
THREADS = 3
"""Threads per block on the host: few, odd, and more than one."""

PRELUDE = """
#define HYBRIDOPT_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#include <math.h>
#include <utility>
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Index { int x; };
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
"""
POSTLUDE = """
template <class... A, size_t... I>
static void loop(void (*kernel)(A...), int grid, int block, void** args,
                 std::index_sequence<I...>) {
  gridDim.x = grid; blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) kernel(*(A*)args[I]...);
}
template <class... A>
static void launch(void (*kernel)(A...), int grid, int block, void** args) {
  loop(kernel, grid, block, args, std::index_sequence_for<A...>());
}
"""
ENTRY = (
    'extern "C" void launch_{0}(int g, int b, void** a) {{ launch({0}, g, b, a); }}\n'
)


def build(file: str, variant: tuple[Any, ...]) -> ctypes.CDLL:
    """Compile one variant of one kernel file for the host."""
    source = kernel_source(file)
    names = re.findall(
        r"__global__ void (?:__launch_bounds__\(\d+\)\s+)?(\w+)\(", source
    )
    assert names, f"no kernel found in {file}"
    text = PRELUDE + source + POSTLUDE + "".join(ENTRY.format(n) for n in names)
    options = kernel_options(file, *variant)
    name = hashlib.sha256((text + repr(options)).encode()).hexdigest()[:16]
    path = FOLDER / f"{name}.cpp"
    path.write_text(text, encoding="utf-8")
    # Symbolic: the C library has an ``advance`` of its own, which would come first.
    flags = ["-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off", "-Wl,-Bsymbolic"]
    command = [
        COMPILER,
        *flags,
        *options,
        str(path),
        "-o",
        str(path.with_suffix(".so")),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(path.with_suffix(".so")))


class HostLauncher(Launcher):
    """Launches the host build; everything else is the launcher under test."""

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        yield 0

    def capturing(self) -> bool:
        return False

    def _kernel(self, name: str, variant: tuple[Any, ...]) -> Any:
        file, _, function = name.partition(".")
        if (file, variant) not in self._kernels:
            self._kernels[file, variant] = build(file, variant)
        entry = getattr(self._kernels[file, variant], f"launch_{function or file}")

        def run(grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            assert block[0] <= 1024
            held = [self._converted(a) for a in args]
            pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
            entry(grid[0], THREADS, pointers)

        return run

    def _converted(self, value: Any) -> Any:
        if isinstance(value, int):
            return ctypes.c_longlong(value)
        if isinstance(value, self._numpy.ndarray):
            assert value.size == 1, "CuPy takes arrays of one struct only"
            return (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())
        return ctypes.c_float(float(value))


def host_ops(chunk_size: int | None = 16) -> CupyOps:
    """A ``CupyOps`` on CPU tensors; small chunks, so that tensors have several."""
    ops = object.__new__(CupyOps)
    ops.device = torch.device("cpu")
    ops._reference = TorchOps()
    ops.launcher = HostLauncher(None, ops.device)
    ops.launcher.chunk_size = chunk_size
    return ops
