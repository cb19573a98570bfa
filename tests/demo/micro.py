"""A model and schedule so small that a whole demo takes a second."""

from hybridopt.demo.model import ModelConfig
from hybridopt.demo.presets import Preset

MICRO = Preset(
    model=ModelConfig(layers=1, heads=2, width=16, context=16),
    batch_size=2,
    steps=40,
    checkpoint_steps=3,
    tuned_rate=1e-2,
    warmup_steps=1,
    validation_batches=2,
)
