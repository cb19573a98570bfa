"""hybridopt: predicted steps for any PyTorch optimizer.

>>> import torch
>>> from hybridopt import HybridPredictOptimizer
>>> weight = torch.nn.Parameter(torch.ones(2))
>>> opt = HybridPredictOptimizer(torch.optim.SGD([weight], lr=0.1))
>>> float(opt.step(lambda: (weight**2).sum()))
2.0
"""

from hybridopt.config import HybridConfig
from hybridopt.errors import HybridError
from hybridopt.optimizer import HybridPredictOptimizer
from hybridopt.types import Phase

__all__ = ["HybridConfig", "HybridError", "HybridPredictOptimizer", "Phase"]
__version__ = "0.1.0"
