"""Command, commit, hardware and versions, for every result file."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocator import keep_freed_memory
from benchmarks.suite import Options

__all__ = ["command_line", "hardware", "provenance"]

_PACKAGES = ("torch", "schedulefree", "pytorch_optimizer", "scikit-learn", "msgspec",
             "transformers", "coolprop")  # fmt: skip


def provenance(
    command: Sequence[str], options: Options, *, jobs: int = 1
) -> dict[str, Any]:
    """Where the numbers of a result file come from."""
    # Loaded now, with the commit that is written down, not when its first run begins.
    import hybridopt.optimizer  # noqa: F401

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "command": shlex.join(command),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "seeds": list(options.seeds),
        "scale": options.scale,
        "hardware": hardware(options.device),
        "cores": os.cpu_count(),
        "jobs": jobs,
        "threads": options.threads,
        "memory": "kept by the process" if keep_freed_memory() else "as malloc likes",
        "versions": versions,
    }


def hardware(device: str) -> str:
    """Name of the processor that trains."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with_name = [
        line.split(":", 1)[1].strip()
        for line in _cpu_lines()
        if line.startswith("model name")
    ]
    return with_name[0] if with_name else platform.machine()


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    """Commit of the sources, marked where they were changed since; or 'unknown'.

    A copy of the sources apart from its repository says what it is by
    ``HYBRIDOPT_BENCH_COMMIT``.
    """
    named = os.environ.get("HYBRIDOPT_BENCH_COMMIT")
    if named:
        return named
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", "hybridopt", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line() -> list[str]:
    """How this process was started, without paths of this machine."""
    words = [Path(w).name if os.path.isabs(w) else w for w in sys.argv[1:]]
    return ["python", "-m", "benchmarks", *words]
