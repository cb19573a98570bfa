"""The checkpoint that fine-tuning starts from: trained once, then cached.

The cache is under ``$XDG_CACHE_HOME/hybridopt`` (or ``~/.cache/hybridopt``), keyed by
everything that the weights depend on. A file that cannot be used is made again.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from hybridopt.demo.model import ByteGPT
from hybridopt.demo.train import RunPlan, Task, TrainingRun, Weights
from hybridopt.telemetry import events
from hybridopt.telemetry.live import Display

__all__ = ["cache_directory", "checkpoint", "checkpoint_key"]

_FORMAT = 1
_BROKEN = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What torch.load and load_state_dict raise on damaged or foreign files."""


def cache_directory() -> Path:
    """Where the demo keeps its checkpoints."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hybridopt"


def checkpoint_key(task: Task) -> str:
    """Name of a checkpoint: a hash over model, schedule, text and device kind."""
    parts = {
        "format": _FORMAT,
        "preset": task.preset,
        "text": task.corpus.digest,
        "seed": task.seed,
        "rate": task.learning_rate,
        "device": task.device.type,
    }
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:20]


def checkpoint(task: Task, display: Display) -> tuple[Weights, float]:
    """Trained weights and their held-out loss, from the cache where possible.

    Args:
        task: Training from scratch on the text that the checkpoint is to know.
        display: Shows the training, or that the cache was used.
    """
    path = cache_directory() / f"checkpoint-{checkpoint_key(task)}.pt"
    if path.exists():
        loaded = _load(path, task)
        if loaded is not None:
            display.say(f"checkpoint: {path} (held-out loss {loaded[1]:.4f})")
            return loaded
    steps = task.preset.checkpoint_steps
    display.say(
        f"checkpoint: training {steps} steps on {task.corpus.name} (cached afterwards)"
    )
    initial = ByteGPT(task.preset.model).initialize(task.seed).state_dict()
    run = TrainingRun(RunPlan("checkpoint", "AdamW from scratch", steps), task, initial)
    progress = display.add(run.plan.name, steps)
    run.advance(steps, progress, display.refresh)
    progress.validation_loss = loss = run.evaluate()
    weights = run.weights()
    _save(path, weights, loss)
    return weights, loss


def _load(path: Path, task: Task) -> tuple[Weights, float] | None:
    """Read a cached checkpoint; None, with an event, when it cannot be used."""
    try:
        content: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True
        )
        weights, loss = content["weights"], float(content["loss"])
        ByteGPT(task.preset.model).load_state_dict(weights)
    except _BROKEN as error:
        events.cache_discarded(str(path), f"{type(error).__name__}: {error}"[:200])
        return None
    return weights, loss


def _save(path: Path, weights: Weights, loss: float) -> None:
    """Write beside the target and rename, so that no reader sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.stem, delete=False
        ) as file:
            torch.save({"weights": weights, "loss": loss}, file)
        os.replace(file.name, path)
    except OSError as error:
        # A read-only home is no reason to stop: the next run trains it again.
        events.cache_discarded(str(path), f"not written: {error}")
