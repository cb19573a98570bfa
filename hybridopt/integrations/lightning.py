"""Lightning: predicted steps skip forward and backward, with everything else intact.

``class Hybrid(HybridLightningMixin, MyModule): ...`` and return a
``HybridPredictOptimizer`` from ``configure_optimizers``. Hooks, ``global_step``,
accumulation, clipping, checkpoints and schedulers work as before.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from hybridopt.closure import quiet_forward
from hybridopt.distributed import release_unsharded
from hybridopt.errors import ConfigError
from hybridopt.optimizer import HybridPredictOptimizer

__all__ = ["HybridLightningMixin"]


class HybridLightningMixin:
    """Makes predicted steps cheap under Lightning's automatic optimization.

    Put it before the ``LightningModule`` among the bases. Without it everything is
    correct too, but Lightning runs forward and backward on every step and the
    optimizer, handed gradients, predicts nothing.
    """

    forward_on_predicted_steps: bool = False
    """Whether ``training_step`` runs (without gradients) on predicted steps, so that
    its own logging and BatchNorm statistics see every batch. Costs one forward."""

    _last_output: Any = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own on real steps; the last loss, or a forward, on predicted.

        Raises:
            ConfigError: fp16 with a gradient scaler, which Lightning steps itself.
        """
        self._refuse_scaler()
        super_step = super().training_step  # type: ignore[misc]
        if self._needs_backward():
            output = super_step(*args, **kwargs)
            self._last_output = _detached(output)
            return output
        if self._last_output is not None and not self.forward_on_predicted_steps:
            return self._last_output
        module = cast(nn.Module, self)
        # A resumed run knows no loss yet; its one forward must leave no trace.
        seen = (
            nullcontext() if self.forward_on_predicted_steps else quiet_forward(module)
        )
        with torch.no_grad(), seen:
            output = super_step(*args, **kwargs)
        release_unsharded(module)
        return output

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The module's own on real steps; nothing on predicted ones."""
        if self._needs_backward():
            super().backward(loss, *args, **kwargs)  # type: ignore[misc]

    def _needs_backward(self) -> bool:
        # The same answer for all micro-batches of one accumulated step.
        optimizers = self.trainer.optimizers  # type: ignore[attr-defined]
        return all(
            o.needs_backward
            for o in optimizers
            if isinstance(o, HybridPredictOptimizer)
        )

    def _refuse_scaler(self) -> None:
        plugin = self.trainer.precision_plugin  # type: ignore[attr-defined]
        if getattr(plugin, "scaler", None) is not None:
            raise ConfigError(
                "Trainer(precision='16-mixed'): Lightning steps its gradient scaler on "
                "every step, and a scaler refuses predicted steps, which have no "
                "gradients. Use precision='bf16-mixed' or '32-true'."
            )


def _detached(output: Any) -> Any:
    """What ``training_step`` returned, without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        return {key: _detached(value) for key, value in output.items()}
    return output
