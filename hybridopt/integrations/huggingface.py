"""Hugging Face Trainer: wraps the optimizer it creates; predicted steps cost nothing.

``class HybridTrainer(HybridTrainerMixin, Trainer): ...`` and pass ``hybrid_config=`` if
the defaults do not suit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridopt.closure import quiet_forward
from hybridopt.config import HybridConfig
from hybridopt.distributed import release_unsharded
from hybridopt.errors import ConfigError
from hybridopt.optimizer import HybridPredictOptimizer

__all__ = ["HybridTrainerMixin", "hybrid_optimizer"]


class HybridTrainerMixin:
    """Put it before ``transformers.Trainer`` (or a subclass) among the bases.

    Args:
        hybrid_config: Configuration of the optimizer; None: the default.
    """

    _last_loss: Tensor | None = None

    def __init__(
        self, *args: Any, hybrid_config: HybridConfig | None = None, **kwargs: Any
    ) -> None:
        self.hybrid_config = hybrid_config
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's own optimizer, wrapped once.

        Raises:
            ConfigError: ``fp16=True``: accelerate steps its gradient scaler on every
                step.
        """
        optimizer: Optimizer = super().create_optimizer(  # type: ignore[misc]
            *args, **kwargs
        )
        self._refuse_scaler()
        # The Trainer may ask again, and may have been given a wrapped one.
        if hybrid_optimizer(optimizer) is None:
            optimizer = HybridPredictOptimizer(
                optimizer,
                self.hybrid_config,
                model=self.model,  # type: ignore[attr-defined]
            )
            self.optimizer = optimizer
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward on real steps; the last loss on predicted ones."""
        hybrid = hybrid_optimizer(self.optimizer)
        if hybrid is None or hybrid.needs_backward:
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
            loss = loss.detach()
        elif self._last_loss is not None:
            loss = self._last_loss
        else:
            loss = self._loss_without_trace(*args, **kwargs)
        # A copy, since the Trainer adds to what it gets.
        self._last_loss = loss.clone()
        return loss

    def _loss_without_trace(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> Tensor:
        """One forward of a run resumed in the middle of Predict, which knows no loss.

        The uninterrupted run had none, so random streams and buffers stay as they are.
        """
        trainer: Any = self
        with torch.no_grad(), quiet_forward(model):
            inputs = trainer._prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(model, inputs)
        release_unsharded(model)
        micro_batches: int = trainer.args.gradient_accumulation_steps
        return loss.detach() / micro_batches

    def _refuse_scaler(self) -> None:
        accelerator = getattr(self, "accelerator", None)
        if getattr(accelerator, "scaler", None) is not None:
            raise ConfigError(
                "TrainingArguments(fp16=True): accelerate steps its gradient scaler on "
                "every step, and a scaler refuses predicted steps, which have no "
                "gradients. Use bf16=True or full precision."
            )


def hybrid_optimizer(optimizer: Any) -> HybridPredictOptimizer | None:
    """The ``HybridPredictOptimizer`` in, or inside accelerate's wrapper; None if none.

    accelerate's wrapper forwards no attributes, so ``needs_backward`` has to be asked
    of what it wraps.
    """
    while optimizer is not None:
        if isinstance(optimizer, HybridPredictOptimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None
