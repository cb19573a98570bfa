"""One way for every arm to get memory: what was freed stays with the process.

With glibc's own thresholds a large buffer that is freed may go back to the system, and
its pages are then faulted in anew at the next step. Whether that happens depends on
where in the heap the process happens to keep other things: the same bare step of a
2.2M-weight model took 12 or 27 ms, by what had run before it. That is no property of an
optimizer.
"""

from __future__ import annotations

import ctypes
import ctypes.util

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_BLOCK = 32 << 20
"""Bytes; more than this glibc refuses."""
_KEPT = 1 << 30
"""Bytes of free memory at the heap's end that stay."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, in blocks of up to 32 MiB.

    Returns:
        Whether it will; False where there is no glibc.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_BLOCK), (_TRIM_THRESHOLD, _KEPT))
    return all(mallopt(key, value) == 1 for key, value in settings)
