"""Every error that hybridopt raises, each with the action that recovers from it.

Expected trouble (a loss spike, a bad prediction) is a ``Verdict``, not an exception.
An exception means that the caller has to change something; the message names the
field, the value, the rule and the way out, and the training state is as it was before
the call that raised.
"""

from __future__ import annotations

import enum

__all__ = [
    "CheckpointError",
    "ClosureError",
    "ConfigError",
    "DivergenceError",
    "HybridError",
    "KernelUnavailableError",
    "NonFiniteError",
    "RecoveryAction",
]


class RecoveryAction(enum.Enum):
    """What to do about trouble, ordered from mild to severe."""

    CONTINUE = "continue"
    SKIP_STEP = "skip_step"
    SHORTEN_HORIZON = "shorten_horizon"
    ROLL_BACK = "roll_back"
    RESET_PREDICTOR = "reset_predictor"
    RETURN_TO_FULL = "return_to_full"
    RESTORE_CHECKPOINT = "restore_checkpoint"
    FIX_CONFIGURATION = "fix_configuration"


class HybridError(Exception):
    """Base class of all hybridopt errors.

    Attributes:
        recovery: The action that code can take without reading the message.
    """

    recovery: RecoveryAction = RecoveryAction.CONTINUE

    def __init__(self, message: str, *, recovery: RecoveryAction | None = None) -> None:
        super().__init__(message)
        if recovery is not None:
            self.recovery = recovery


class ConfigError(HybridError, ValueError):
    """A configuration value breaks its rule; nothing was built."""

    recovery = RecoveryAction.FIX_CONFIGURATION


class ClosureError(HybridError):
    """The closure returned something that no step can be made of."""

    recovery = RecoveryAction.FIX_CONFIGURATION


class NonFiniteError(HybridError):
    """NaN or inf where the caller asked for an exception instead of a skipped step."""

    recovery = RecoveryAction.SKIP_STEP


class DivergenceError(HybridError):
    """Training diverged and no snapshot is left to go back to."""

    recovery = RecoveryAction.RESTORE_CHECKPOINT


class CheckpointError(HybridError):
    """A checkpoint cannot be loaded; optimizer and weights are unchanged."""

    recovery = RecoveryAction.RESTORE_CHECKPOINT


class KernelUnavailableError(HybridError):
    """A kernel backend was asked for by name and cannot run here."""

    recovery = RecoveryAction.FIX_CONFIGURATION
