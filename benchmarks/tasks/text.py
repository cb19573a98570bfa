"""Real text that is on every machine with Python and torch: their own sources.

They differ between versions. ``python -m benchmarks fetch`` keeps a snapshot, which is
read instead where ``--data`` has it, so that machines see the same text.
"""

from __future__ import annotations

import ctypes
import hashlib
import lzma
import sysconfig
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tasks.base import TaskUnavailableError, batch_generator

__all__ = [
    "Corpus",
    "cpp_headers",
    "held_out_windows",
    "python_source",
    "raw_bytes",
    "windows",
    "write_snapshot",
]

_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes of other files to judge by."""

    train: Tensor
    """(n,) uint8."""
    held_out: Tensor
    """(m,) uint8; every tenth file."""

    @property
    def digest(self) -> str:
        """Short name of this very text, for caches of what was trained on it."""
        content = hashlib.sha256()
        for part in (self.train, self.held_out):
            content.update(raw_bytes(part))
        return content.hexdigest()[:12]


@lru_cache(maxsize=4)
def python_source(limit_bytes: int = 4_000_000, data: Path | None = None) -> Corpus:
    """The standard library's own source."""
    kept = _snapshot(data, "python")
    if kept is not None:
        return kept
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not _SKIPPED & set(p.parts))
    return _corpus(root, files, limit_bytes)


@lru_cache(maxsize=4)
def cpp_headers(limit_bytes: int = 4_000_000, data: Path | None = None) -> Corpus:
    """The C++ headers that the torch wheel carries."""
    kept = _snapshot(data, "headers")
    if kept is not None:
        return kept
    root = Path(torch.__file__).parent / "include"
    return _corpus(root, root.rglob("*.h"), limit_bytes)


PARTS = ("train", "held")


def write_snapshot(folder: Path, name: str, corpus: Corpus) -> None:
    """Keep a corpus as ``NAME.train.xz`` and ``NAME.held.xz``."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in zip(PARTS, (corpus.train, corpus.held_out), strict=True):
        packed = lzma.compress(raw_bytes(text), preset=9)
        (folder / f"{name}.{part}.xz").write_bytes(packed)


def _snapshot(data: Path | None, name: str) -> Corpus | None:
    if data is None:
        return None
    files = [data / "text" / f"{name}.{part}.xz" for part in PARTS]
    if not all(path.exists() for path in files):
        return None
    texts = (bytearray(lzma.decompress(path.read_bytes())) for path in files)
    return Corpus(*(torch.frombuffer(text, dtype=torch.uint8) for text in texts))


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


def raw_bytes(tensor: Tensor) -> bytes:
    """A contiguous CPU tensor's memory; torch has no quick way to it without numpy."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


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
