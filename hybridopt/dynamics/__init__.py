"""What comes next: predictors that live in coefficient space.

``PriorPredictor`` is the analytic rule; ``LearnedPredictor`` puts a model (linear,
multilayer perceptron, recurrent state-space model) between its statistics and its
gains. Read ``gains``, then ``prior``, then ``learned``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from hybridopt.config import MLP, RSSM, HybridConfig, Linear, Prior
from hybridopt.dynamics.learned import LearnedPredictor
from hybridopt.dynamics.linear import LinearModel
from hybridopt.dynamics.mlp import MLPModel
from hybridopt.dynamics.prior import PriorPredictor
from hybridopt.dynamics.recurrent import RSSMModel

__all__ = [
    "LearnedPredictor",
    "LinearModel",
    "MLPModel",
    "PriorPredictor",
    "RSSMModel",
    "build_predictor",
]


def build_predictor(
    config: HybridConfig,
    sizes: Sequence[int],
    ndims: Sequence[int],
    generator_seed: int | None = None,
) -> PriorPredictor | LearnedPredictor:
    """The predictor that ``config.predictor`` asks for.

    Args:
        config: Read for ``predictor``, ``gain``, ``drift`` and ``memory``.
        sizes: Number of elements of each of the L parameter tensors, in group order.
        ndims: Number of dimensions of each of them.
        generator_seed: Seed of the model's own generator; ``config.seed`` when None.
    """
    seed = config.seed if generator_seed is None else generator_seed
    size = len(sizes)
    chosen = config.predictor
    match chosen:
        case Prior():
            return PriorPredictor(config, list(sizes))
        case Linear():
            return LearnedPredictor(
                config, sizes, ndims, lambda: LinearModel(chosen, size)
            )
        case MLP():
            return LearnedPredictor(
                config, sizes, ndims, lambda: MLPModel(chosen, size, seed)
            )
        case RSSM():
            return LearnedPredictor(
                config, sizes, ndims, lambda: RSSMModel(chosen, size, seed)
            )
        case unknown:
            assert_never(unknown)
