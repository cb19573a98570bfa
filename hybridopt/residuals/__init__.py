"""How wrong predictions were, and what that says about the next one."""

from hybridopt.residuals.corrector import SimilarityCorrector, build_corrector
from hybridopt.residuals.lowrank import LowRankResidual
from hybridopt.residuals.store import ResidualStore

__all__ = [
    "LowRankResidual",
    "ResidualStore",
    "SimilarityCorrector",
    "build_corrector",
]
