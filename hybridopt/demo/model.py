"""A compact byte-level GPT: decoder-only transformer, GPT-2's initialization.

Source: Radford et al. 2019 (GPT-2): pre-normalization, GELU, learned positions, output
layer tied to the embedding, residual projections initialized smaller with depth.
Differs: 256 byte values instead of a tokenizer, no biases, no dropout.
"""

from __future__ import annotations

import math
from typing import cast

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BYTES", "ByteGPT", "ModelConfig"]

BYTES = 256
"""Vocabulary size: every byte value."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Size of a ``ByteGPT``."""

    layers: int
    heads: int
    width: int
    """Size of the residual stream; a multiple of ``heads``."""
    context: int
    """Longest input, in bytes."""


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) in, the same shape out."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        shape = (batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(x.shape))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + cast(Tensor, self.mlp_out(hidden))


class ByteGPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.bytes = nn.Embedding(BYTES, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def initialize(self, seed: int) -> ByteGPT:
        """Draw all weights from a generator of its own; returns the model itself."""
        generator = torch.Generator().manual_seed(seed)
        shrink = 1 / math.sqrt(2 * self.config.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(1.0)
                    continue
                std = 0.02 * (shrink if name.endswith("_out.weight") else 1.0)
                drawn = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(drawn)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (batch, time, 256) for the byte behind each of ``inputs``.

        Args:
            inputs: (batch, time) int64 byte values, time at most ``config.context``.
        """
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.bytes(inputs) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.bytes.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte, 0-dim float32."""
        logits = self(inputs).float().view(-1, BYTES)
        return F.cross_entropy(logits, targets.reshape(-1))
