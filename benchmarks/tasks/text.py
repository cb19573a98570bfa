"""Real text that is on every machine with Python and torch: their own sources."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tasks.base import TaskUnavailableError, batch_generator

__all__ = ["Corpus", "cpp_headers", "held_out_windows", "python_source", "windows"]

_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes of other files to judge by."""

    train: Tensor
    """(n,) uint8."""
    held_out: Tensor
    """(m,) uint8; every tenth file."""


@lru_cache(maxsize=4)
def python_source(limit_bytes: int = 4_000_000) -> Corpus:
    """The standard library's own source; differs between Python versions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not _SKIPPED & set(p.parts))
    return _corpus(root, files, limit_bytes)


@lru_cache(maxsize=4)
def cpp_headers(limit_bytes: int = 4_000_000) -> Corpus:
    """The C++ headers that the torch wheel carries."""
    root = Path(torch.__file__).parent / "include"
    return _corpus(root, root.rglob("*.h"), limit_bytes)


def _corpus(root: Path, files: Iterable[Path], limit_bytes: int) -> Corpus:
    """Join files in an order that mixes folders, up to about ``limit_bytes``.

    Raises:
        TaskUnavailableError: Fewer than 100 kB of text under ``root``.
    """
    # Ordered by a hash of the path: the first megabytes then come from everywhere.
    ordered = sorted(files, key=lambda p: zlib.crc32(str(p.relative_to(root)).encode()))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for i, path in enumerate(ordered):
        if total >= limit_bytes:
            break
        # One huge generated file must not be most of the text.
        text = path.read_bytes()[: limit_bytes // 20]
        parts[i % 10 == 9].append(text)
        total += len(text)
    if total < 100_000:
        raise TaskUnavailableError(
            f"{root} holds {total} bytes of source text: at least 100000 are needed. "
            "Use a Python and a torch that were installed with their sources."
        )
    train, held_out = (
        torch.frombuffer(bytearray(b"\n".join(p)), dtype=torch.uint8) for p in parts
    )
    return Corpus(train, held_out)


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, length) int64 byte values from each start, on the text's device."""
    columns = torch.arange(length, device=text.device)
    rows = starts.to(text.device).unsqueeze(1) + columns
    return text[rows].long()


def held_out_windows(text: Tensor, count: int, length: int) -> Tensor:
    """The same ``count`` windows for every arm and seed."""
    last = len(text) - length
    starts = torch.randint(last, (count,), generator=batch_generator(-1, 0))
    return windows(text, starts, length)
