"""Runs a function of a module in several gloo processes on this machine.

One launch per file, not per test, because each costs the imports of torch twice.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


def launch(module: str, world_size: int = 2) -> list[dict[str, Any]]:
    """Results of ``module.main(rank)`` on every rank.

    Retried once: gloo's processes on a crowded machine now and then abort at exit.
    """
    failures = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            failure = _run(module, world_size, Path(folder))
            if failure is None:
                return [
                    torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
                    for rank in range(world_size)
                ]
            failures.append(failure)
    raise AssertionError("\n".join(failures))


def _run(module: str, world_size: int, folder: Path) -> str | None:
    """None on success, else what the ranks wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        log = (folder / f"{rank}.log").open("w")
        command = [
            sys.executable,
            "-m",
            "tests.distributed.launch",
            module,
            str(folder),
        ]
        ranks.append(
            (
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=log
                ),
                log,
            )
        )
    deadline = time.monotonic() + TIMEOUT_S
    codes = []
    for process, log in ranks:
        try:
            codes.append(process.wait(max(1.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
        log.close()
    complete = all((folder / f"{rank}.pt").exists() for rank in range(world_size))
    if complete and not any(codes):
        return None
    logs = [(folder / f"{rank}.log").read_text()[-4000:] for rank in range(world_size)]
    return f"exit codes {codes}\n" + "\n--- next rank ---\n".join(logs)


def _child(module: str, folder: str) -> None:
    import importlib

    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = importlib.import_module(module).main(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    # Without it a rank may tear down while the other still waits for it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2])
