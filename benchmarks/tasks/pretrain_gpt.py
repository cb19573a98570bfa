"""Byte-level GPT from scratch on Python's own source."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tasks.base import BatchTask, Setting
from benchmarks.tasks.gpt import GPT, SIZES, gpt_task, size_for
from benchmarks.tasks.text import python_source

__all__ = ["make"]


def make(setting: Setting, *, size: str | None = None) -> BatchTask[Tensor]:
    """Build the task; the seed sets initial weights and batches.

    Args:
        setting: Seed, scale and device.
        size: A name in ``SIZES`` instead of the scale's own.
    """
    shape = SIZES[size] if size else size_for(setting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = GPT(shape).to(setting.device)
    return gpt_task(model, python_source(data=setting.data), shape, setting)
