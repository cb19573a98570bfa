"""How near to the memory's speed do the kernels run, and how far ahead of torch?

Every operation at three model sizes, fp32 and bf16 weights (gradients alike, directions
bf16), against the device-to-device copy of the same card and against the best way to do
the same work with ``torch._foreach_*`` or per tensor (``TorchOps`` and the hand-written
twins in ``foreach_twins``).

Timing: CUDA events around one call behind a device-side delay, so that the host's
launches are not in it; median; operands rotate among sets that exceed the L2 cache
together; random data. Needs a CUDA device and CuPy.

    python -m benchmarks.kernels [--sizes 5M,124M,1.5B] [--out benchmarks/results]
    python -m benchmarks.kernels --tune
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.foreach_twins import TWINS
from benchmarks.kernel_cases import (
    DEVICE,
    SIZES,
    Operands,
    cases,
    operand_sets,
    traffic,
)
from hybridopt.kernels import compilation, select_ops
from hybridopt.kernels.cupy_ops import CupyOps
from hybridopt.kernels.torch_ops import TorchOps


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    size: str
    weights: int
    dtype: str
    kernel: str
    bytes_per_weight: int
    time_ms: float
    bandwidth_gb_s: float
    share_of_copy: float
    foreach_ms: float
    foreach_name: str
    ratio: float
    host_us: float


def median_ms(call: Callable[[Operands], object], sets: Sequence[Operands]) -> float:
    """Median device time of a call, sets in rotation."""
    for one in sets:
        call(one)
    torch.cuda.synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 8 or (len(times) < 60 and time.perf_counter() - began < 1.0):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        one = sets[len(times) % len(sets)]
        # Else advance would meet anchor == theta, so zeros, from the second call on.
        one.theta, one.gradient = one.gradient, one.theta
        torch.cuda._sleep(3_000_000)  # the host launches meanwhile
        start.record()
        call(one)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_us(call: Callable[[Operands], object], one: Operands) -> float:
    """Median host time of an enqueued call, in microseconds."""
    times = []
    for _ in range(30):
        began = time.perf_counter()
        call(one)
        times.append(time.perf_counter() - began)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def copy_bandwidth() -> float:
    """Bytes per second of a 2 GiB device-to-device copy, read plus written."""
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / (statistics.median(times) * 1e-3)


def rows(size: str, dtype: torch.dtype, copy_speed: float) -> Iterator[Row]:
    """Measure every kernel at one size and dtype."""
    weights = sum(torch.Size(s).numel() for s in SIZES[size])
    sets = operand_sets(size, dtype)
    ours = cases(select_ops("cupy", DEVICE))
    reference = cases(TorchOps())
    for kernel, call in ours.items():
        spent = median_ms(call, sets)
        rivals = {"TorchOps": reference[kernel], **TWINS.get(kernel, {})}
        if kernel == "adamw+move":
            del rivals["TorchOps"]  # its fused step reads coefficients on the host
        measured = {name: median_ms(r, sets) for name, r in rivals.items()}
        best = min(measured, key=lambda name: measured[name])
        speed = traffic(kernel, dtype) * weights / (spent * 1e-3)
        yield Row(
            size,
            weights,
            str(dtype).removeprefix("torch."),
            kernel,
            traffic(kernel, dtype),
            round(spent, 5),
            round(speed / 1e9, 1),
            round(speed / copy_speed, 4),
            round(measured[best], 5),
            best,
            round(measured[best] / spent, 2),
            round(host_us(call, sets[0]), 1),
        )


def tune(copy_speed: float, out: Path) -> None:
    """Find unroll factor and cache hint per kernel, and one chunk size, at 124M."""
    scores: dict[tuple[str, int, int, int], float] = {}
    chunks, kinds = (16384, 65536), (torch.float32, torch.bfloat16)
    for dtype in kinds:
        sets = operand_sets("124M", dtype)
        weights = sum(t.numel() for t in sets[0].theta)
        for unroll, streaming in itertools.product((1, 2, 4), (0, 1)):
            compilation.UNROLL.update(dict.fromkeys(compilation.UNROLL, unroll))
            compilation.STREAMING.update(dict.fromkeys(compilation.UNROLL, streaming))
            ops = CupyOps(DEVICE)
            for chunk in chunks:
                ops.launcher.chunk_size = chunk
                for name, call in cases(ops).items():
                    moved = traffic(name, dtype) * weights
                    share = moved / (median_ms(call, sets) * 1e-3) / copy_speed
                    key = (name, chunk, unroll, streaming)
                    scores[key] = scores.get(key, 0.0) + share / len(kinds)
                    print(dtype, *key, f"{share:.3f}", flush=True)
    names = sorted({key[0] for key in scores})
    best = {
        chunk: {
            name: max(
                (k for k in scores if k[:2] == (name, chunk)), key=scores.__getitem__
            )
            for name in names
        }
        for chunk in chunks
    }
    chunk = max(chunks, key=lambda c: sum(scores[k] for k in best[c].values()))
    chosen = {name: key[2:] for name, key in best[chunk].items()}
    out.mkdir(parents=True, exist_ok=True)
    record = {"chunk": chunk, "unroll_streaming": chosen}
    (out / "tuning.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(record)


def table(found: Sequence[Row], copy_speed: float, about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Kernels against memory bandwidth and torch",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        f"- device-to-device copy: {copy_speed / 1e9:.0f} GB/s, read plus written",
        "",
        "| size | weights | kernel | bytes/weight | ms | GB/s | of copy "
        "| best torch, ms | which | ratio | host µs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.size} | {r.dtype} | {r.kernel} | {r.bytes_per_weight} "
        f"| {r.time_ms:.4f} | {r.bandwidth_gb_s:.0f} | {100 * r.share_of_copy:.1f} % "
        f"| {r.foreach_ms:.4f} | {r.foreach_name} | {r.ratio:.2f}x | {r.host_us:.0f} |"
        for r in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="5M,124M,1.5B")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy_speed = copy_bandwidth()
    if options.tune:
        tune(copy_speed, options.out)
        return
    import cupy

    card = torch.cuda.get_device_name(DEVICE)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {
        "hardware": card,
        "date": today,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"CuPy {cupy.__version__}, CUDA {torch.version.cuda}",
        "commit": options.commit,
        "command": "python -m benchmarks.kernels " + " ".join(sys.argv[1:]),
    }
    found: list[Row] = []
    for size in options.sizes.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            found += rows(size, dtype, copy_speed)
            torch.cuda.empty_cache()
    text = table(found, copy_speed, about)
    print(text)
    name = "kernels_" + card.split()[1].lower() + "_" + today
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    record = {
        **about,
        "copy_bytes_per_s": copy_speed,
        "rows": [asdict(r) for r in found],
    }
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
