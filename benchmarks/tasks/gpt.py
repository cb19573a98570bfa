"""A byte-level GPT: the model, its sizes, and its loss on windows of text."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.base import BatchTask, Setting, batch_generator
from benchmarks.tasks.text import Corpus, held_out_windows, windows

__all__ = ["GPT", "GPTSize", "SIZES", "gpt_task", "size_for"]


@dataclass(frozen=True)
class GPTSize:
    """Shape of the model and of its batches."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    held_out: int = 64
    """Windows that an evaluation reads."""
    vocabulary: int = 256


SIZES = {
    "tiny": GPTSize(layers=2, width=64, heads=4, context=64, batch=16),
    "small": GPTSize(layers=4, width=128, heads=4, context=128, batch=16),
    "5m": GPTSize(layers=6, width=256, heads=8, context=256, batch=32, held_out=128),
    "124m": GPTSize(layers=12, width=768, heads=12, context=512, batch=16),
    "350m": GPTSize(layers=24, width=1024, heads=16, context=512, batch=8),
    "gpt2": GPTSize(12, 768, 12, context=512, batch=16, vocabulary=50257),
    "gpt2-large": GPTSize(36, 1280, 20, context=512, batch=8, vocabulary=50257),
}
"""5m, 124m and 350m follow the GPT-2 shapes, less the token embedding of its
vocabulary; gpt2 (124M weights) and gpt2-large (774M) have it, for measuring time on
random tokens."""


def size_for(setting: Setting) -> GPTSize:
    """The size that a scale stands for."""
    return SIZES[{"quick": "tiny", "full": "small", "gpu": "5m"}[setting.scale]]


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2, over bytes unless the size says otherwise; head tied to the embedding."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList([Block(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("proj.weight", "down.weight"))
                depth = math.sqrt(2 * size.layers) if residual else 1.0
                nn.init.normal_(p, std=0.02 / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, vocabulary) logits."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def sequence_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of each next byte, in nats; bf16 autocast on CUDA."""
    device = batch.device.type
    autocast = (
        torch.autocast(device, torch.bfloat16)
        if device == "cuda"
        else contextlib.nullcontext()
    )
    with autocast:
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def gpt_task(
    model: nn.Module, corpus: Corpus, size: GPTSize, setting: Setting
) -> BatchTask[Tensor]:
    """Next-byte prediction on random windows of a corpus."""
    length = size.context + 1
    train = corpus.train.to(setting.device)
    held_out = held_out_windows(
        corpus.held_out.to(setting.device), size.held_out, length
    )

    def batch(index: int) -> Tensor:
        generator = batch_generator(setting.seed, index)
        starts = torch.randint(len(train) - length, (size.batch,), generator=generator)
        return windows(train, starts, length)

    @torch.no_grad()
    def evaluate() -> float:
        training = model.training
        model.eval()
        losses = [sequence_loss(model, part) for part in held_out.split(size.batch)]
        model.train(training)
        return float(torch.stack(losses).mean())

    return BatchTask(model, lambda b: sequence_loss(model, b), batch, evaluate)
