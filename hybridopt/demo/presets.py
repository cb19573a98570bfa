"""Sizes and schedules of the demo."""

from __future__ import annotations

import msgspec

from hybridopt.demo.model import ModelConfig
from hybridopt.errors import ConfigError

__all__ = ["FINETUNE_RATE", "PRESETS", "SCENARIOS", "Preset", "preset", "rate_factor"]

FINETUNE_RATE = 3e-5
"""The conservative rate that most fine-tuning scripts start from."""
SCENARIOS = ("finetune", "pretrain")


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One size of the demo."""

    model: ModelConfig
    batch_size: int
    """Sequences per real step."""
    steps: int
    """Scheduled steps of each compared run."""
    checkpoint_steps: int
    """Steps of the run that makes the checkpoint for fine-tuning."""
    tuned_rate: float
    """AdamW's tuned learning rate from scratch."""
    warmup_steps: int
    """Linear warm-up when training from scratch."""
    validation_batches: int
    """Size of the fixed held-out set, in batches of ``batch_size``."""


PRESETS = {
    "tiny": Preset(
        model=ModelConfig(layers=4, heads=4, width=96, context=128),
        batch_size=16,
        steps=400,
        checkpoint_steps=500,
        tuned_rate=3e-3,
        warmup_steps=40,
        validation_batches=12,
    ),
    "small": Preset(
        model=ModelConfig(layers=6, heads=8, width=256, context=256),
        batch_size=16,
        steps=800,
        checkpoint_steps=1600,
        tuned_rate=1e-3,
        warmup_steps=80,
        validation_batches=12,
    ),
    "gpt2": Preset(
        model=ModelConfig(layers=12, heads=12, width=768, context=1024),
        batch_size=8,
        steps=600,
        checkpoint_steps=1200,
        tuned_rate=6e-4,
        warmup_steps=100,
        validation_batches=8,
    ),
}


def preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        ConfigError: Unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}: unknown. Use one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to zero.

    Args:
        step: Index of the step, from 0.
        steps: Scheduled steps.
        warmup_steps: 0: decay from the first step on.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))
