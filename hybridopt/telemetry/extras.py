"""Optional packages, imported where they are used and named clearly when missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from hybridopt.errors import HybridError, RecoveryAction

__all__ = ["require"]


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of the ``demo`` extra.

    Raises:
        HybridError: It is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise HybridError(
            f"{purpose} needs {package}, which cannot be imported ({error}). "
            "Install it with: pip install 'hybridopt[demo]'",
            recovery=RecoveryAction.FIX_CONFIGURATION,
        ) from error
