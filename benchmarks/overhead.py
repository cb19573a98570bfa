"""What wrapping costs per step: bare and hybrid steps side by side in one process.

Two copies of a model train on the same batches, one with the bare base, one wrapped.
The batches are random and change at every step: on one fixed batch hybridopt would find
a smooth problem and make secant moves, whose cost is another question (``--fixed``).

*Blocks*: alternating blocks of real steps (hybridopt with ``max_predict_steps=0``, so
that every call is real and its moves are folded in), synchronized only at block ends:
the overhead that a user sees. *Forced*: a scripted predictor makes four predicted steps
behind every real one, timed one by one with the device synchronized around each.
*Waits*: in a profile of real steps, calls in which the host waits for the GPU, and
copies to pageable memory, which wait too. *Memory*: fresh copies one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import live_tensor_bytes
from benchmarks.overhead_sides import Model, Side, Wrap, forced, hybrid, parse, side

__all__ = ["Options", "Overhead", "main", "measure"]

HORIZON = 4
"""Predicted steps behind every real one where they are forced."""
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Options:
    """How models are measured."""

    pairs: int
    """Pairs of blocks."""
    block: int
    """Steps per block."""
    warm: int = 30
    """Steps of each copy before anything is timed."""
    fixed: bool = False
    """Whether every step sees the same batch."""
    fused: bool = False
    """Whether the base is torch's fused AdamW, which skips bad steps on the device."""
    memory: bool = False
    """Whether memory is measured too."""
    low: bool = False
    """Whether the wrapper runs with ``memory="low"``."""


@dataclass(frozen=True)
class Waits:
    """Per step, in a profile; nan off CUDA."""

    waits: float
    """Calls in which the host waits for the device."""
    pageable: float
    """Copies to pageable host memory, during which the host waits too."""
    pinned: float
    """Copies to pinned host memory, which hold nobody up."""


@dataclass(frozen=True)
class Memory:
    """Device bytes with one kind of wrapper, eager, at the size's own batch."""

    steady: int
    """Allocated between steps."""
    peak: int
    """Most that was allocated during steps (CUDA only; else 0)."""
    requested: int
    """Asked for at that peak, before the allocator rounds up (CUDA only; else 0)."""


@dataclass
class Overhead:
    """Figures of one model; times in seconds, per step."""

    model: str
    device: str
    parameters: int
    tokens: int
    """Per step; 0 where the model reads none."""
    bare_s: float
    """Median of the bare base's step in blocks."""
    wrapped_s: float
    ratio: float
    """Median over pairs of blocks of wrapped over bare time."""
    ratio_quartiles: tuple[float, float]
    host_s: float
    """hybridopt's own host time per real step, by its statistics, waits included."""
    predicted_s: float
    """Median synchronized predicted step, forced."""
    predicted_steps: int
    """How many of them were timed."""
    bare_waits: Waits
    wrapped_waits: Waits
    """Over real steps without predicted ones between."""
    forced_waits: Waits
    """Over cycles of one real step and ``HORIZON`` forced ones, per cycle."""
    memory: dict[str, Memory]
    """By wrapper: bare, default, low; empty if not measured."""
    weights: int
    """Bytes of one copy of the weights."""


def measure(model: Model, device: str, options: Options) -> Overhead:
    """Measure one model."""
    kind = {"fused": options.fused, "fixed": options.fixed}
    bare = side(model, device, **kind)
    settings: dict[str, Any] = {"memory": "low"} if options.low else {}
    wrap = hybrid(max_predict_steps=0, **settings)
    wrapped = side(model, device, wrap=wrap, **kind)
    for one in (bare, wrapped):
        _steps(one, options.warm)
    before = wrapped.optimizer.statistics()
    times = _blocks(bare, wrapped, device, options)
    after = wrapped.optimizer.statistics()
    ratios = [b / a for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    real = after["real_steps"] - before["real_steps"]
    waits = [_profile(one, device) for one in (bare, wrapped)]
    parameters = list(bare.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    numbers = sum(p.numel() for p in parameters)
    # Freed first: a large model leaves no room for three copies.
    del wrapped, parameters
    _collect()
    cycle = side(model, device, wrap=forced(HORIZON, **settings), **kind)
    predicted = _predicted(cycle, device, options.pairs)
    cycles = _profile(cycle, device, steps=2 * (HORIZON + 1), per=HORIZON + 1)
    del bare, cycle
    _collect()
    return Overhead(
        model=str(model),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        parameters=numbers,
        tokens=_tokens(model),
        bare_s=statistics.median(a for a, _ in times),
        wrapped_s=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        ratio_quartiles=(low, high),
        host_s=(after["bookkeeping_s"] - before["bookkeeping_s"]) / max(1, real),
        predicted_s=statistics.median(predicted),
        predicted_steps=len(predicted),
        bare_waits=waits[0],
        wrapped_waits=waits[1],
        forced_waits=cycles,
        memory=_memory(model, device, options) if options.memory else {},
        weights=weights,
    )


def _tokens(model: Model) -> int:
    from benchmarks.tasks.gpt import SIZES

    if model.name not in SIZES:
        return 0
    size = SIZES[model.name]
    return (model.batch or size.batch) * model.micro * size.context


def _steps(one: Side, count: int) -> None:
    for _ in range(count):
        one.step()


def _blocks(
    bare: Side, wrapped: Side, device: str, options: Options
) -> list[tuple[float, float]]:
    """Seconds per step of both sides for each pair; who goes first alternates."""
    times = []
    for i in range(options.pairs):
        order = (bare, wrapped) if i % 2 == 0 else (wrapped, bare)
        spent = [_block(one, device, options.block) for one in order]
        times.append((spent[0], spent[1]) if i % 2 == 0 else (spent[1], spent[0]))
    return times


def _block(one: Side, device: str, block: int) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(block):
        one.step()
    _wait(device)
    return (time.perf_counter() - started) / block


def _predicted(one: Side, device: str, cycles: int) -> list[float]:
    """Seconds of forced predicted steps, less those of the first phase."""
    _steps(one, 3 + 2 * (HORIZON + 1))
    found = []
    for _ in range(cycles * (HORIZON + 1)):
        predicted = not one.optimizer.needs_backward
        spent = _block(one, device, 1)
        if predicted:
            found.append(spent)
    return found


def _profile(one: Side, device: str, steps: int = 10, per: int = 1) -> Waits:
    """Host waits and device-to-host copies per ``per`` steps."""
    if device != "cuda":
        return Waits(math.nan, math.nan, math.nan)
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        torch.profiler.ProfilerActivity.CUDA,
    ]
    _wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("steps"):
            _steps(one, steps)
        _wait(device)
    events = profile.events()
    # The profiler and the line above wait too, behind the steps.
    end = next(e.time_range.end for e in events if e.name == "steps")
    waits = sum(e.name in _WAITS and e.time_range.start < end for e in events)
    out = [e.name for e in events if "Memcpy DtoH" in e.name]
    pinned = sum("Pinned" in name for name in out)
    share = per / steps
    return Waits(waits * share, (len(out) - pinned) * share, pinned * share)


def _memory(model: Model, device: str, options: Options) -> dict[str, Memory]:
    """Each kind of optimizer alone, from an empty device."""
    kinds: dict[str, Wrap | None] = {
        "bare": None,
        "default": hybrid(max_predict_steps=0),
        "low": hybrid(max_predict_steps=0, memory="low"),
    }
    small = Model(model.name)
    found = {}
    for name, wrap in kinds.items():
        _collect()
        start = _allocated(device)
        asked = _requested("current") if device == "cuda" else 0
        one = side(small, device, fused=options.fused, wrap=wrap)
        _steps(one, 14)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _steps(one, 6)
        peak = torch.cuda.max_memory_allocated() - start if device == "cuda" else 0
        requested = _requested("peak") - asked if device == "cuda" else 0
        one.optimizer.zero_grad()
        found[name] = Memory(_allocated(device) - start, peak, requested)
        del one
    _collect()
    return found


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return live_tensor_bytes()


def _requested(what: str) -> int:
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{what}"])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure models by name and print or write the figures; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks overhead", description=__doc__)
    parser.add_argument(
        "--models", default="mlp,tiny", help="name[:batch[xmicro]][:compile], ..."
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--block", type=int, default=20, help="steps per block")
    parser.add_argument("--warm", type=int, default=30, help="steps before timing")
    parser.add_argument("--fixed", action="store_true", help="one batch: secant moves")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--memory", action="store_true", help="measure memory too")
    parser.add_argument("--low", action="store_true", help='memory="low"')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for Markdown and JSON")
    parser.add_argument("--stem", default="overhead", help="their name")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        models = [parse(text) for text in options.models.split(",")]
    except ValueError as wrong:
        parser.error(str(wrong))
    chosen = Options(
        options.pairs,
        options.block,
        options.warm,
        options.fixed,
        options.fused,
        options.memory,
        options.low,
    )
    command = list(arguments) if arguments is not None else None
    found: list[Overhead] = []
    for model in models:
        figures = measure(model, options.device, chosen)
        found.append(figures)
        print(_line(figures), flush=True)
        if options.out:
            # After every model: a later one may run out of time or memory.
            _write(options.out, options.stem, found, options.device, command)
    return 0


def _write(
    folder: Path,
    stem: str,
    found: list[Overhead],
    device: str,
    command: list[str] | None,
) -> None:
    from benchmarks.overhead_table import markdown
    from benchmarks.provenance import provenance
    from benchmarks.suite import Options as SuiteOptions

    words = ["python -m benchmarks overhead", *(command or [])]
    meta = provenance(words, SuiteOptions(device=device, seeds=(0,)))
    rows: list[dict[str, Any]] = [asdict(o) for o in found]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": meta, "models": rows}, indent=1)
    (folder / f"{stem}.json").write_text(text + "\n", "utf-8")
    (folder / f"{stem}.md").write_text(markdown(meta, rows), "utf-8")


def _line(o: Overhead) -> str:
    low, high = o.ratio_quartiles
    return (
        f"{o.model}: bare {1e3 * o.bare_s:.3f} ms, wrapped {1e3 * o.wrapped_s:.3f} ms, "
        f"ratio {o.ratio:.4f} [{low:.4f}, {high:.4f}], own host time "
        f"{1e6 * o.host_s:.0f} us; forced predicted step {1e3 * o.predicted_s:.3f} ms; "
        f"waits {o.bare_waits.waits:.1f} -> {o.wrapped_waits.waits:.1f}, pageable "
        f"{o.bare_waits.pageable:.1f} -> {o.wrapped_waits.pageable:.1f} per real step, "
        f"{o.forced_waits.waits:.1f} and {o.forced_waits.pageable:.1f} per cycle"
    )
