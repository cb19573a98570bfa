"""What fetch does to the files it is given; nothing is downloaded here."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import fetch
from benchmarks.tasks.text import Corpus, raw_bytes

FILES = {
    f"{part}-{kind}-ubyte.gz": gzip.compress(
        bytes(header) + bytes(i % 10 for i in range(count * size))
    )
    for part, count in (("train", 300), ("t10k", 20))
    for kind, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1))
}


def debian(path: Path, files: dict[str, bytes]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./usr/share/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    raw = b"!<arch>\n"
    members = (("debian-binary", b"2.0"), ("data.tar.xz", packed.getvalue()))
    for name, content in members:
        raw += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    path.write_bytes(raw)


def test_debian_package_is_read_without_its_tools(tmp_path):
    debian(tmp_path / "a.deb", {**FILES, "readme": b"no"})
    assert fetch.debian_files(tmp_path / "a.deb", ".gz") == FILES
    (tmp_path / "b.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(OSError, match=r"b\.deb"):
        fetch.debian_files(tmp_path / "b.deb", ".gz")


def test_fashion_is_packed_and_read_back(tmp_path, monkeypatch):
    pytest.importorskip("numpy")
    from benchmarks.tasks import convnet
    from benchmarks.tasks.base import Setting

    def download(words, cwd, **_):
        assert words[:2] == ["apt-get", "download"]
        debian(Path(cwd) / "dataset.deb", FILES)

    monkeypatch.setattr(fetch.subprocess, "run", download)
    monkeypatch.setattr(fetch, "_SMALL", (200, 10))
    assert fetch.main([str(tmp_path), "--only", "fashion", "--small"]) == 0
    x, y, held_x, held_y = convnet.fashion_mnist(tmp_path)
    assert (len(x), len(held_x)) == (200, 10)
    assert y[:3].tolist() == held_y[:3].tolist() == [0, 1, 2]
    assert x[0, 0, 0, 1] == pytest.approx((1 / 255 - 0.286) / 0.353)
    convnet.make(Setting(data=tmp_path)).closure().backward()


def test_half_precision_keeps_everything_but_the_digits():
    weights = torch.tensor([1.5, -2.25, 3.1415926])
    counts = torch.arange(3, dtype=torch.int64)
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "n": {"dtype": "I64", "shape": [3], "data_offsets": [12, 36]},
    }
    packed = json.dumps(header).encode()
    raw = len(packed).to_bytes(8, "little") + packed
    halved = fetch.half_precision(raw + raw_bytes(weights) + raw_bytes(counts))
    length = int.from_bytes(halved[:8], "little")
    found = json.loads(halved[8 : 8 + length])
    assert found["w"] == {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}
    assert found["n"]["data_offsets"] == [6, 30]
    data = halved[8 + length :]
    kept = torch.frombuffer(bytearray(data[:6]), dtype=torch.float16)
    assert torch.equal(kept, weights.half())
    assert data[6:] == raw_bytes(counts)


def test_what_fails_is_named_and_the_rest_comes(tmp_path, monkeypatch, capsys):
    def fails(folder, small):
        raise OSError("no network")

    monkeypatch.setitem(fetch.PARTS, "water", fails)
    monkeypatch.setitem(fetch.PARTS, "text", lambda folder, small: None)
    assert fetch.main([str(tmp_path), "--only", "water,text"]) == 1
    printed = capsys.readouterr()
    assert "water: failed: no network" in printed.err
    assert "text: done" in printed.out
    with pytest.raises(SystemExit):
        fetch.main([str(tmp_path), "--only", "nothing"])


def test_raw_bytes_are_the_tensors_own():
    assert raw_bytes(torch.tensor([1, 2, 255], dtype=torch.uint8)) == b"\x01\x02\xff"
    text = torch.zeros(3, dtype=torch.uint8)
    assert Corpus(text, text).digest == Corpus(text.clone(), text).digest
