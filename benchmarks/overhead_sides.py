"""The two copies that an overhead measurement compares: bare base and wrapped base."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.gpt import GPT, SIZES, sequence_loss
from hybridopt.demo.model import ByteGPT
from hybridopt.demo.presets import PRESETS

__all__ = ["Model", "Side", "build", "forced", "hybrid", "parse", "side"]


@dataclass(frozen=True)
class Model:
    """What is trained: ``name[:batch[xmicro]][:compile]`` on the command line."""

    name: str
    """mlp, demo (the demo's model and batch) or a size of ``SIZES``."""
    batch: int | None = None
    """Sequences per forward; the size's own when None."""
    micro: int = 1
    """Forwards and backwards whose gradients are added up in one step."""
    compiled: bool = False

    def __str__(self) -> str:
        batch = "" if self.batch is None else f":{self.batch}"
        micro = f"x{self.micro}" if self.micro > 1 else ""
        return self.name + batch + micro + (":compile" if self.compiled else "")


def parse(text: str) -> Model:
    """Read a model off the command line.

    Raises:
        ValueError: An unknown name or a broken number.
    """
    name, *rest = text.split(":")
    if name not in ("mlp", "demo", *SIZES):
        raise ValueError(f"model {name!r}: use mlp, demo, {', '.join(SIZES)}.")
    compiled = rest[-1:] == ["compile"]
    rest = rest[:-1] if compiled else rest
    batch, _, micro = rest[0].partition("x") if rest else ("", "", "")
    return Model(
        name, int(batch) if batch else None, int(micro) if micro else 1, compiled
    )


@dataclass
class Side:
    """One of the copies: its model, its optimizer, and how it steps."""

    model: nn.Module
    optimizer: Any
    step: Callable[[], Any]


Wrap = Callable[[Any, nn.Module], Any]


def build(
    model: Model, device: str, *, fixed: bool = False
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and a forward closure that goes round a few random batches.

    Args:
        model: What to build.
        device: Where.
        fixed: Whether every step sees the same batch.
    """
    torch.manual_seed(0)
    count = model.micro if fixed else 16
    calls = itertools.count()
    if model.name == "mlp":
        layers = (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        made: nn.Module = nn.Sequential(*layers, nn.Linear(64, 10)).to(device)
        x = torch.randn(count, 64, 64, device=device)
        y = torch.randint(10, (count, 64), device=device)
        called: Any = torch.compile(made) if model.compiled else made

        def loss() -> Tensor:
            i = next(calls) % count
            return F.cross_entropy(called(x[i]), y[i])

        return made, loss
    if model.name == "demo":
        preset = PRESETS["tiny"]
        made = ByteGPT(preset.model).initialize(0).to(device)
        shape = (count, model.batch or preset.batch_size, preset.model.context + 1)
        batches = torch.randint(256, shape, device=device)
    else:
        size = SIZES[model.name]
        with torch.device(device):
            made = GPT(size)
            shape = (count, model.batch or size.batch, size.context + 1)
            batches = torch.randint(size.vocabulary, shape)
    called = torch.compile(made) if model.compiled else made
    return made, lambda: sequence_loss(called, batches[next(calls) % count])


def side(
    model: Model,
    device: str,
    *,
    fused: bool = False,
    fixed: bool = False,
    wrap: Wrap | None = None,
) -> Side:
    """Build one copy; ``wrap`` turns base and model into a wrapped optimizer."""
    made, forward = build(model, device, fixed=fixed)
    # A conservative rate: the copies must stay finite for as long as they are timed.
    base = torch.optim.AdamW(made.parameters(), lr=1e-5, fused=fused)

    def classic() -> Tensor:
        base.zero_grad()
        total = torch.zeros((), device=device)
        for _ in range(model.micro):
            part = forward() / model.micro
            part.backward()
            total += part.detach()
        return total

    if wrap is None:

        def step() -> Tensor:
            value = classic()
            base.step()
            return value

        return Side(made, base, step)
    wrapped = wrap(base, made)
    closure = forward if model.micro == 1 else classic
    return Side(made, wrapped, lambda: wrapped.step(closure))


def hybrid(**overrides: Any) -> Wrap:
    """A wrapper with the default configuration, less ``overrides``."""
    from hybridopt.optimizer import HybridPredictOptimizer

    return lambda base, model: HybridPredictOptimizer(base, model=model, **overrides)


def forced(horizon: int, **overrides: Any) -> Wrap:
    """A wrapper that makes ``horizon`` predicted steps behind every real one.

    A short run at a conservative rate would make none by itself, so a scripted
    predictor claims the worth: the kernels, the copies and the host's work are those of
    any predicted step; where the weights go means nothing.
    """
    from hybridopt.config import FixedHorizon
    from hybridopt.run import Components

    return hybrid(
        warmup_steps=3,
        max_predict_steps=horizon,
        bandit=FixedHorizon(),
        components=Components(predictor=_Claims()),
        **overrides,
    )


class _Claims:
    """A predictor that always proposes a hundredth of a step and claims many."""

    moving = False

    def observe(self, observation: Any) -> None:
        pass

    def forecast(self, slopes: Tensor) -> Any:
        from hybridopt.types import Forecast

        coefficients = torch.zeros(len(slopes), 2, dtype=torch.float64)
        coefficients[:, 0] = 0.01
        return Forecast(coefficients, 1.0, 99.0, 99.0)

    def feedback(self, outcome: Any) -> None:
        pass

    def reset(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
