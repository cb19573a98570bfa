"""Real text that is already on the machine, as bytes, split by file.

No file is in both parts, so the validation loss never measures memorized files. The
split depends on the files' names relative to their root, never on their order or on a
random generator: the same text gives the same split on every machine.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybridopt.errors import ConfigError

__all__ = ["Corpus", "c_headers", "read_corpus", "standard_library", "text_at"]

_VALIDATION_SHARE = 0.1
_NOT_LIBRARY = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
)
_MAX_BYTES = 16 * 2**20
_MIN_VALIDATION_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text in two disjoint parts."""

    name: str
    """Where the text comes from, in words."""
    train: Tensor
    """(bytes,) uint8."""
    validation: Tensor
    """(bytes,) uint8, from other files than ``train``."""
    train_files: int
    validation_files: int
    """0 when a single file was split by position instead."""
    digest: str
    """SHA-256 of both parts; names the text in cache keys and reports."""


def standard_library() -> Corpus:
    """The Python standard library's source, without tests and installed packages.

    Raises:
        ConfigError: This Python has no readable library source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY & set(path.relative_to(root).parts)
    ]
    return read_corpus("Python standard library", root, files)


def c_headers() -> Corpus:
    """C and C++ headers: torch's own, else Python's, else the system's.

    Raises:
        ConfigError: None of the three is there.
    """
    candidates = (
        ("PyTorch's C++ headers", Path(torch.__file__).parent / "include"),
        ("Python's C headers", Path(sysconfig.get_paths()["include"])),
        ("system C headers", Path("/usr/include")),
    )
    for name, root in candidates:
        # ATen/ops holds thousands of generated near-copies: no text to learn from.
        files = [path for path in root.rglob("*.h") if path.parent.name != "ops"]
        if len(files) >= 20:
            return read_corpus(name, root, files)
    places = ", ".join(str(root) for _, root in candidates)
    raise ConfigError(
        f"no C headers found in {places}. Name some text with --text FILE_OR_DIR."
    )


def text_at(path: str | Path) -> Corpus:
    """The user's own text: one file, or all text files under a directory.

    Raises:
        ConfigError: Nothing there, or too little of it.
    """
    root = Path(path)
    if root.is_file():
        return _split_file(root)
    if not root.is_dir():
        raise ConfigError(f"--text {path}: no such file or directory. Check the path.")
    return read_corpus(str(path), root, (p for p in root.rglob("*") if p.is_file()))


def read_corpus(
    name: str, root: Path, files: Iterable[Path], limit_bytes: int = _MAX_BYTES
) -> Corpus:
    """Read files and put about one in ten aside for validation.

    Files are taken in the order of a hash of their relative name until ``limit_bytes``
    are read; those whose hash is in the lowest tenth are for validation. Files with a
    NUL byte (binaries) and unreadable files are left out.

    Raises:
        ConfigError: Too little text for a validation part.
    """
    hashed = sorted((_position(path.relative_to(root)), path) for path in files)
    train: list[bytes] = []
    validation: list[bytes] = []
    sizes = [0, 0]
    limits = [
        limit_bytes * (1 - _VALIDATION_SHARE),
        limit_bytes * _VALIDATION_SHARE,
    ]
    for position, path in hashed:
        part = int(position < _VALIDATION_SHARE)
        if sizes[part] >= limits[part]:
            continue
        content = _content(path)
        sizes[part] += len(content)
        if content:
            (validation if part else train).append(content)
    if not validation and len(train) > 1:
        # Few files may all miss the lowest tenth: the lowest hash is then the held out.
        validation.append(train.pop(0))
    return _corpus(name, train, validation)


def _position(relative: Path) -> float:
    """A file's fixed place in [0, 1), by its name."""
    digest = hashlib.sha256(relative.as_posix().encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _content(path: Path) -> bytes:
    """The file's bytes; empty for binaries and files that cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return b"" if b"\0" in content else content


def _split_file(path: Path) -> Corpus:
    """One file: its last tenth is for validation, by position."""
    content = _content(path)
    cut = int(len(content) * (1 - _VALIDATION_SHARE))
    corpus = _corpus(str(path), [content[:cut]], [content[cut:]])
    return Corpus(
        corpus.name, corpus.train, corpus.validation, 1, 0, digest=corpus.digest
    )


def _corpus(name: str, train: list[bytes], validation: list[bytes]) -> Corpus:
    """Join the files of each part."""
    parts = [b"\n".join(train), b"\n".join(validation)]
    if len(parts[1]) < _MIN_VALIDATION_BYTES or len(parts[0]) < len(parts[1]):
        raise ConfigError(
            f"text {name}: {len(parts[0])} bytes to train on and {len(parts[1])} held "
            f"out; {_MIN_VALIDATION_BYTES} held-out bytes are needed, and more to "
            "train on. Name more text with --text FILE_OR_DIR."
        )
    digest = hashlib.sha256(hashlib.sha256(parts[0]).digest() + parts[1]).hexdigest()
    tensors = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
    return Corpus(
        name, tensors[0], tensors[1], len(train), len(validation), digest=digest
    )
