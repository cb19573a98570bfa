"""Is training going wrong: signals that notice it, a monitor that judges."""

from hybridopt.guard.monitor import DivergenceMonitor
from hybridopt.guard.signals import default_signals

__all__ = ["DivergenceMonitor", "default_signals"]
