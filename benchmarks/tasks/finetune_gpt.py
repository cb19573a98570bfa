"""A byte-level GPT that knows Python's source, fine-tuned on C++ headers.

The pretrained weights are made here, once per size and version, and kept in a cache
folder (``HYBRIDOPT_BENCH_CACHE``, else ``~/.cache/hybridopt-bench``). All seeds start
from the same pretrained weights and differ in their batches, as fine-tuning runs do.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.schedules import factor
from benchmarks.tasks import pretrain_gpt
from benchmarks.tasks.base import BatchTask, Setting
from benchmarks.tasks.gpt import GPT, SIZES, GPTSize, gpt_task, size_for
from benchmarks.tasks.lora import add_adapters
from benchmarks.tasks.text import cpp_headers, python_source

__all__ = ["make", "make_lora", "pretrained"]

_PRETRAIN_STEPS = {"tiny": 1000, "small": 1500, "5m": 2000, "124m": 1500, "350m": 1000}
_PRETRAIN_RATE = {"tiny": 3e-3, "small": 2e-3, "5m": 1e-3, "124m": 6e-4, "350m": 3e-4}


def cache_folder() -> Path:
    """Where pretrained weights are kept between runs."""
    named = os.environ.get("HYBRIDOPT_BENCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "hybridopt-bench"


def pretrained(name: str, setting: Setting) -> dict[str, Tensor]:
    """Weights of the size after pretraining on Python's source, from the cache or made
    now (tuned rate, WSD, AdamW).
    """
    steps, rate = _PRETRAIN_STEPS[name], _PRETRAIN_RATE[name]
    text = python_source(data=setting.data).digest
    kind = setting.device.split(":")[0]
    path = cache_folder() / f"gpt-{name}-{text}-{kind}-{steps}.pt"
    with _alone(path):
        if not path.exists():
            _make(path, name, setting, steps, rate)
        weights: dict[str, Tensor] = torch.load(path, map_location=setting.device)
    return weights


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time make the weights; the others wait for them.

    A lock file that nobody has touched for ten minutes was left by a process that was
    killed, and is ignored.
    """
    if path.exists():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    while not path.exists():
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > 600.0:
                    lock.unlink()
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _make(path: Path, name: str, setting: Setting, steps: int, rate: float) -> None:
    task = pretrain_gpt.make(replace(setting, seed=1_000), size=name)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor("wsd", steps))
    for _ in range(steps):
        optimizer.zero_grad()
        task.closure().backward()
        task.advance()
        optimizer.step()
        schedule.step()
    # Written beside and renamed: an interrupted run leaves no broken cache.
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(task.model.state_dict(), partial)
    partial.replace(path)


def _model(setting: Setting, size: str | None) -> tuple[GPT, GPTSize]:
    shape = SIZES[size] if size else size_for(setting)
    name = next(key for key, value in SIZES.items() if value == shape)
    with torch.random.fork_rng(devices=[]):
        model = GPT(shape).to(setting.device)
    model.load_state_dict(pretrained(name, setting))
    return model, shape


def make(setting: Setting, *, size: str | None = None) -> BatchTask[Tensor]:
    """Fine-tune all weights; the seed sets the batches."""
    model, shape = _model(setting, size)
    return gpt_task(model, cpp_headers(data=setting.data), shape, setting)


def make_lora(setting: Setting, *, size: str | None = None) -> BatchTask[Tensor]:
    """Fine-tune low-rank adapters only; the seed sets adapters and batches."""
    model, shape = _model(setting, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        add_adapters(model, rank=8)
    return gpt_task(
        model.to(setting.device), cpp_headers(data=setting.data), shape, setting
    )
