"""Which phase next, and how far."""

from hybridopt.control.bandit import build_policy
from hybridopt.control.controller import Controller

__all__ = ["Controller", "build_policy"]
