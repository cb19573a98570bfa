"""Which backend runs the weight-space arithmetic: the one place that chooses."""

from __future__ import annotations

from typing import Literal

import structlog
import torch

from hybridopt.errors import ConfigError, KernelUnavailableError
from hybridopt.kernels.torch_ops import TorchOps
from hybridopt.protocols import Ops

__all__ = ["select_ops"]


def select_ops(name: Literal["auto", "torch", "cupy"], device: torch.device) -> Ops:
    """Build the backend for tensors on one device.

    Args:
        name: ``torch`` and ``cupy`` name a backend, and no other is then used. ``auto``
            takes cupy on CUDA where it runs and torch otherwise; where a CUDA device
            has to do without cupy, one ``kernels_fallback`` event says why.
        device: Where the parameters live.

    Raises:
        KernelUnavailableError: ``cupy`` was asked for and cannot run on ``device``.
        ConfigError: Unknown name.
    """
    match name:
        case "torch":
            return TorchOps()
        case "cupy":
            return _cupy_ops(device)
        case "auto" if device.type != "cuda":
            return TorchOps()
        case "auto":
            try:
                return _cupy_ops(device)
            except KernelUnavailableError as error:
                structlog.get_logger("hybridopt").warning(
                    "kernels_fallback",
                    backend="torch",
                    device=str(device),
                    reason=str(error),
                )
                return TorchOps()
    raise ConfigError(f"kernels={name!r}: unknown. Use 'auto', 'torch' or 'cupy'.")


def _cupy_ops(device: torch.device) -> Ops:
    # Imported here so that a run on torch never pays for, or needs, cupy.
    from hybridopt.kernels.cupy_ops import CupyOps

    return CupyOps(device)
