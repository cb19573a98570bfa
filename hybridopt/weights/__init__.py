"""Weight space: the only room, besides the base optimizer, that writes parameters."""

from hybridopt.weights.noise import NoiseMeter
from hybridopt.weights.secant import SecantMover
from hybridopt.weights.space import WeightSpace

__all__ = ["NoiseMeter", "SecantMover", "WeightSpace"]
