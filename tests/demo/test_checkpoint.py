import dataclasses
import io

import msgspec
import pytest
import structlog
import torch

from hybridopt.demo.checkpoint import cache_directory, checkpoint, checkpoint_key
from hybridopt.demo.text import text_at
from hybridopt.demo.train import Task
from hybridopt.telemetry.live import PlainDisplay
from tests.demo.micro import MICRO


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_bytes(b"All work and no play makes Jack a dull boy.\n" * 2000)
    return Task(MICRO, text_at(text), 0, torch.device("cpu"), 1e-2, 0.5)


def make(task):
    stream = io.StringIO()
    with structlog.testing.capture_logs() as logs:
        weights, loss = checkpoint(task, PlainDisplay(stream))
    structlog.reset_defaults()
    return weights, loss, stream.getvalue(), logs


def cached_file():
    (path,) = cache_directory().glob("*")
    return path


def test_checkpoint_is_trained_once_and_then_read_from_the_cache(task):
    weights, loss, said, logs = make(task)
    assert "training 3 steps" in said
    assert logs == []
    again, same_loss, said, _ = make(task)
    assert "training" not in said
    assert same_loss == loss
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_checkpoint_cache_leaves_no_other_file(task):
    make(task)
    assert cached_file().name == f"checkpoint-{checkpoint_key(task)}.pt"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(b"not a checkpoint at all"),
        lambda path: torch.save({"weights": {}, "loss": 1.0}, path),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["empty", "truncated", "foreign", "wrong weights", "wrong type"],
)
def test_damaged_cache_is_reported_and_trained_again(task, damage):
    weights, _, _, _ = make(task)
    damage(cached_file())
    again, _, said, logs = make(task)
    assert "training 3 steps" in said
    assert [log["event"] for log in logs] == ["cache_discarded"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert make(task)[3] == []


def test_cache_never_runs_code_from_its_file(task, tmp_path):
    make(task)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"weights": Evil(), "loss": 1.0}, cached_file())
    _, _, said, logs = make(task)
    assert not marker.exists()
    assert "training 3 steps" in said
    assert logs[0]["event"] == "cache_discarded"


def test_cache_that_cannot_be_written_does_not_stop_training(
    task, monkeypatch, tmp_path
):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    weights, _, said, logs = make(task)
    assert weights
    assert "training 3 steps" in said
    assert "not written" in logs[0]["reason"]


def test_checkpoint_key_depends_on_text_model_and_schedule(task, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(b"Some other text that is long enough.\n" * 3000)
    longer = msgspec.structs.replace(MICRO, checkpoint_steps=4)
    keys = {
        checkpoint_key(task),
        checkpoint_key(dataclasses.replace(task, corpus=text_at(other))),
        checkpoint_key(dataclasses.replace(task, preset=longer)),
        checkpoint_key(dataclasses.replace(task, learning_rate=2e-2)),
    }
    assert len(keys) == 4
