"""hybridopt: predicted steps for any PyTorch optimizer.

>>> import torch
>>> from hybridopt import HybridPredictOptimizer
>>> weight = torch.nn.Parameter(torch.ones(2))
>>> opt = HybridPredictOptimizer(torch.optim.SGD([weight], lr=0.1))
>>> float(opt.step(lambda: (weight**2).sum()))
2.0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridopt.config import HybridConfig
    from hybridopt.errors import HybridError
    from hybridopt.optimizer import HybridPredictOptimizer
    from hybridopt.types import Phase

__all__ = ["HybridConfig", "HybridError", "HybridPredictOptimizer", "Phase"]
__version__ = "0.1.0"

_HOMES = {
    "HybridConfig": "hybridopt.config",
    "HybridError": "hybridopt.errors",
    "HybridPredictOptimizer": "hybridopt.optimizer",
    "Phase": "hybridopt.types",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, and ``hybridopt --help`` does not need it.
    if name not in _HOMES:
        raise AttributeError(f"module 'hybridopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
