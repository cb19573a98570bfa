"""What wrapping costs per step: bare and hybrid steps side by side in one process.

Two copies of a model train on the same batches, one with the bare base, one wrapped.
The batches are random and change at every step: on one fixed batch hybridopt would find
a smooth problem and make secant moves, whose cost is another question (``--fixed``).
*Blocks*: alternating blocks of real steps (hybridopt with ``max_predict_steps=0``, so
that every call is real and its moves are folded in), synchronized only at block ends:
the overhead that a user sees. *Single steps*: the default configuration, synchronized
at every step, real and predicted ones apart. On CUDA a profile counts the host's waits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.counting import live_tensor_bytes
from benchmarks.tasks.gpt import GPT, SIZES, sequence_loss
from hybridopt.demo.model import ByteGPT
from hybridopt.demo.presets import PRESETS

__all__ = ["Options", "Overhead", "Side", "main", "measure"]

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Options:
    """How models are measured."""

    pairs: int
    """Pairs of blocks."""
    block: int
    """Steps per block."""
    compiled: bool = False
    """Whether the model goes through ``torch.compile``."""
    fixed: bool = False
    """Whether every step sees the same batch."""
    fused: bool = False
    """Whether the base is torch's fused AdamW, which skips bad steps on the device."""
    batch: int | None = None
    """Sequences per step; the size's own when None."""


@dataclass
class Side:
    """One of the two copies: its closure and how it steps."""

    model: nn.Module
    optimizer: Any
    step: Callable[[], Any]


@dataclass
class Overhead:
    """Figures of one model; times in seconds, per step."""

    model: str
    device: str
    parameters: int
    compiled: bool
    bare_s: float
    """Median of the bare base's step in blocks."""
    wrapped_s: float
    ratio: float
    """Median over pairs of blocks of wrapped over bare time."""
    ratio_quartiles: tuple[float, float]
    host_s: float
    """hybridopt's own host time per real step, by its statistics."""
    real_s: float
    """Median synchronized real step in the default configuration."""
    predicted_s: float
    """Median synchronized predicted step; nan if none was made."""
    predicted_share: float
    extra_bytes: int
    """Steady memory beyond that of the bare copy."""
    extra_copies: float
    """The same in copies of the weights."""
    waits_bare: float
    """Host synchronizations per real step in the profile; nan off CUDA."""
    waits_wrapped: float
    transfers_bare: float
    """Device-to-host copies per real step; nan off CUDA."""
    transfers_wrapped: float


def build(name: str, device: str, *, options: Options) -> tuple[nn.Module, Any]:
    """A model and a forward closure that goes round a few random batches."""
    torch.manual_seed(0)
    compiled, count = options.compiled, 1 if options.fixed else 16
    calls = itertools.count()
    if name == "mlp":
        layers = (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        model: nn.Module = nn.Sequential(*layers, nn.Linear(64, 10)).to(device)
        x = torch.randn(count, 64, 64, device=device)
        y = torch.randint(10, (count, 64), device=device)
        called = torch.compile(model) if compiled else model

        def loss() -> Tensor:
            i = next(calls) % count
            return F.cross_entropy(called(x[i]), y[i])

        return model, loss
    if name == "demo":
        preset = PRESETS["tiny"]
        model = ByteGPT(preset.model).initialize(0).to(device)
        rows, context = preset.batch_size, preset.model.context
    else:
        size = SIZES[name]
        model = GPT(size).to(device)
        rows, context = size.batch, size.context
    shape = (count, options.batch or rows, context + 1)
    batches = torch.randint(256, shape, device=device)
    called = torch.compile(model) if compiled else model
    return model, lambda: sequence_loss(called, batches[next(calls) % count])


def side(name: str, device: str, *, options: Options, wrap: Any = None) -> Side:
    """Build one copy; ``wrap`` turns base and model into a wrapped optimizer."""
    model, loss = build(name, device, options=options)
    # A conservative rate: the copies must stay finite for as long as they are timed.
    base = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=options.fused)
    if wrap is not None:
        wrapped = wrap(base, model)
        return Side(model, wrapped, lambda: wrapped.step(loss))

    def step() -> Tensor:
        base.zero_grad()
        value: Tensor = loss()
        value.backward()
        base.step()
        return value

    return Side(model, base, step)


def hybrid(**overrides: Any) -> Callable[[Any, nn.Module], Any]:
    """A wrapper with the default configuration, less ``overrides``."""
    from hybridopt.optimizer import HybridPredictOptimizer

    return lambda base, model: HybridPredictOptimizer(base, model=model, **overrides)


def measure(name: str, device: str, options: Options) -> Overhead:
    """Measure one model."""
    start = _allocated(device)
    bare = side(name, device, options=options)
    _warm(bare)
    middle = _allocated(device)
    wrapped = side(name, device, options=options, wrap=hybrid(max_predict_steps=0))
    _warm(wrapped)
    extra = (_allocated(device) - middle) - (middle - start)
    before = wrapped.optimizer.statistics()
    times = _blocks(bare, wrapped, device, options)
    after = wrapped.optimizer.statistics()
    ratios = [b / a for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    weights = sum(p.numel() * p.element_size() for p in bare.model.parameters())
    steps = after["real_steps"] - before["real_steps"]
    waits = _profile(bare, device), _profile(wrapped, device)
    real, predicted = _single(name, device, options)
    return Overhead(
        model=name,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        parameters=sum(p.numel() for p in bare.model.parameters()),
        compiled=options.compiled,
        bare_s=statistics.median(a for a, _ in times),
        wrapped_s=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        ratio_quartiles=(low, high),
        host_s=(after["bookkeeping_s"] - before["bookkeeping_s"]) / max(1, steps),
        real_s=statistics.median(real) if real else float("nan"),
        predicted_s=statistics.median(predicted) if predicted else float("nan"),
        predicted_share=len(predicted) / max(1, len(real) + len(predicted)),
        extra_bytes=extra,
        extra_copies=extra / weights,
        waits_bare=waits[0][0],
        waits_wrapped=waits[1][0],
        transfers_bare=waits[0][1],
        transfers_wrapped=waits[1][1],
    )


def _warm(one: Side, steps: int = 30) -> None:
    """Past hybridopt's warm-up, its allocations and any compilation."""
    for _ in range(steps):
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


def _single(
    name: str, device: str, options: Options
) -> tuple[list[float], list[float]]:
    """Seconds of real and of predicted steps in the default configuration."""
    one = side(name, device, options=options, wrap=hybrid())
    _warm(one)
    real, predicted = [], []
    for _ in range(options.pairs * options.block):
        calls = one.optimizer.statistics()["backward_calls"]
        spent = _block(one, device, 1)
        ran_backward = one.optimizer.statistics()["backward_calls"] > calls
        (real if ran_backward else predicted).append(spent)
    return real, predicted


def _profile(one: Side, device: str, steps: int = 10) -> tuple[float, float]:
    """Host waits and device-to-host copies per step."""
    if device != "cuda":
        return float("nan"), float("nan")
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        torch.profiler.ProfilerActivity.CUDA,
    ]
    _wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            one.step()
    events = profile.events()
    waits = sum(e.name in _WAITS for e in events)
    copies = sum("Memcpy DtoH" in e.name for e in events)
    # The profiler itself waits once at its end.
    return max(0, waits - 1) / steps, copies / steps


def _allocated(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return live_tensor_bytes()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure models by name and print or write the figures; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks overhead", description=__doc__)
    parser.add_argument(
        "--models", default="mlp,tiny", help=f"mlp, demo, {', '.join(SIZES)}"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--block", type=int, default=20, help="steps per block")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model"
    )
    parser.add_argument("--fixed", action="store_true", help="one batch: secant moves")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = Options(
        options.pairs,
        options.block,
        options.compile,
        options.fixed,
        options.fused,
        options.batch,
    )
    found = []
    for name in options.models.split(","):
        figures = measure(name, options.device, chosen)
        found.append(asdict(figures))
        print(_line(figures), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


def _line(o: Overhead) -> str:
    low, high = o.ratio_quartiles
    return (
        f"{o.model}: bare {1e3 * o.bare_s:.3f} ms, wrapped {1e3 * o.wrapped_s:.3f} ms, "
        f"ratio {o.ratio:.4f} [{low:.4f}, {high:.4f}], own host time "
        f"{1e6 * o.host_s:.0f} us; synchronized: real {1e3 * o.real_s:.3f} ms, "
        f"predicted {1e3 * o.predicted_s:.3f} ms ({100 * o.predicted_share:.0f} %); "
        f"memory +{o.extra_copies:.2f} weight copies; waits {o.waits_bare:.1f} -> "
        f"{o.waits_wrapped:.1f}, copies to host {o.transfers_bare:.1f} -> "
        f"{o.transfers_wrapped:.1f} per step"
    )
