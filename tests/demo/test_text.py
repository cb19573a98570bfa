import hashlib

import pytest
import torch

from hybridopt.demo.text import (
    c_headers,
    read_corpus,
    standard_library,
    text_at,
)
from hybridopt.errors import ConfigError


def write_files(root, count=60, size=2000):
    paths = []
    for index in range(count):
        path = root / f"part{index % 3}" / f"file{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"<{index}>".encode() * (size // 4))
        paths.append(path)
    return paths


def contents(tensor):
    return bytes(tensor.tolist())


def test_split_is_by_file_disjoint_and_complete(tmp_path):
    paths = write_files(tmp_path)
    corpus = read_corpus("x", tmp_path, paths)
    train, held_out = contents(corpus.train), contents(corpus.validation)
    inside = [
        (path.read_bytes() in train, path.read_bytes() in held_out) for path in paths
    ]
    assert all(a != b for a, b in inside)
    assert corpus.train_files == sum(a for a, _ in inside)
    assert corpus.validation_files == sum(b for _, b in inside)
    assert corpus.train_files + corpus.validation_files == 60


def test_split_depends_on_names_not_on_order_or_place(tmp_path):
    paths = write_files(tmp_path / "a")
    others = write_files(tmp_path / "b")
    first = read_corpus("x", tmp_path / "a", paths)
    second = read_corpus("x", tmp_path / "b", reversed(others))
    assert first.digest == second.digest
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)


def test_digest_changes_with_one_byte(tmp_path):
    paths = write_files(tmp_path)
    before = read_corpus("x", tmp_path, paths).digest
    paths[7].write_bytes(paths[7].read_bytes()[:-1] + b"!")
    assert read_corpus("x", tmp_path, paths).digest != before


def test_limit_keeps_a_tenth_for_validation(tmp_path):
    paths = write_files(tmp_path, count=300)
    corpus = read_corpus("x", tmp_path, paths, limit_bytes=200_000)
    assert 180_000 <= len(corpus.train) < 190_000
    assert 20_000 <= len(corpus.validation) < 30_000


def test_binary_and_unreadable_files_are_left_out(tmp_path):
    paths = write_files(tmp_path)
    clean = read_corpus("x", tmp_path, paths).digest
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    more = [*paths, tmp_path / "binary.txt", tmp_path / "missing.txt"]
    assert read_corpus("x", tmp_path, more).digest == clean


def test_single_file_is_split_by_position(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"0123456789" * 10_000)
    corpus = text_at(path)
    assert len(corpus.train) == 90_000
    assert len(corpus.validation) == 10_000
    assert corpus.validation_files == 0
    assert (
        corpus.digest
        == hashlib.sha256(
            hashlib.sha256(b"0123456789" * 9_000).digest() + b"0123456789" * 1_000
        ).hexdigest()
    )


def test_too_little_text_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ConfigError, match="--text"):
        text_at(tmp_path)


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        text_at(tmp_path / "nowhere")


def test_standard_library_is_real_python_without_tests():
    corpus = standard_library()
    assert len(corpus.train) > 2_000_000
    assert len(corpus.validation) > 200_000
    assert contents(corpus.train).count(b"def ") > 5_000


def test_c_headers_are_there_and_differ_from_the_library():
    corpus = c_headers()
    assert len(corpus.train) > 100_000
    assert contents(corpus.train).count(b"#include") > 100
