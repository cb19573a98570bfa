"""The arms of every comparison: bare base, hybridopt and its ablations, peers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import peers
from benchmarks.calibration import Watch
from benchmarks.counting import Meter
from benchmarks.moments import MomentsAfterMove
from benchmarks.schedules import Schedule, factor, warmup

__all__ = ["ABLATIONS", "ARMS", "PEERS", "Arm", "Setup", "Stepper"]


@dataclass(frozen=True)
class Setup:
    """What a run is asked to do."""

    steps: int
    """Scheduled steps, N."""
    lr: float
    schedule: Schedule
    base: Literal["adamw", "adam", "sgd", "rmsprop", "muon"] = "adamw"
    weight_decay: float = 0.01

    @property
    def warmup_steps(self) -> int:
        """Steps over which the schedule raises the rate; 0 if it starts at its top."""
        return warmup(self.schedule, self.steps)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """A fresh base optimizer over the trainable parameters."""
        if self.base == "muon":
            return peers.MuonAdamW(model, self.lr, weight_decay=self.weight_decay)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # On a GPU everybody uses torch's fused step, and so does the wrapped base.
        fused = True if all(p.is_cuda for p in parameters) else None
        decay = self.weight_decay
        match self.base:
            case "adam":
                return torch.optim.Adam(parameters, lr=self.lr, fused=fused)
            case "sgd":
                return torch.optim.SGD(
                    parameters, lr=self.lr, momentum=0.9, fused=fused
                )
            case "rmsprop":
                return torch.optim.RMSprop(parameters, lr=self.lr)
        return torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=decay, fused=fused
        )

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule over N steps, driving ``optimizer``."""
        return LambdaLR(optimizer, factor(self.schedule, self.steps))


class Stepper:
    """One arm at work: ``step`` is one scheduled step.

    Args:
        optimizer: Anything with ``step(closure)``.
        meter: Counts the closure's work.
        scheduler: Stepped after every step; None for methods without a schedule.
        takes_forward: Whether ``step`` wants a forward closure (hybridopt) instead of a
            classic one that clears, runs forward and backward.
        evaluation: Context in which the arm wants to be judged, at weights that are not
            those it trains; None for the training weights.
    """

    def __init__(
        self,
        optimizer: Any,
        meter: Meter,
        *,
        scheduler: LambdaLR | None = None,
        takes_forward: bool = False,
        evaluation: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.optimizer, self.meter, self.scheduler = optimizer, meter, scheduler
        self._evaluation = evaluation or contextlib.nullcontext
        self.judged_elsewhere = evaluation is not None
        self._closure = meter.forward if takes_forward else self._classic
        # Peers written here step their base's gradients; the base clears them.
        self._clears: Any = getattr(optimizer, "optimizer", optimizer)

    def _classic(self) -> Tensor:
        self._clears.zero_grad()
        loss = self.meter.forward()
        loss.backward()
        return loss

    def step(self) -> None:
        """One scheduled step."""
        self.optimizer.step(self._closure)
        if self.scheduler is not None:
            self.scheduler.step()

    def evaluation(self) -> contextlib.AbstractContextManager[Any]:
        """The weights that the arm is judged by, for the block."""
        return self._evaluation()

    def statistics(self) -> dict[str, Any]:
        """The optimizer's own figures, empty if it keeps none."""
        own = getattr(self.optimizer, "statistics", None)
        return dict(own()) if callable(own) else {}

    def calibration(self) -> dict[str, Any]:
        """How the optimizer's forecasts came out, empty if it makes none."""
        own = getattr(self.optimizer, "calibration", None)
        return dict(own()) if callable(own) else {}


Build = Callable[[nn.Module, Meter, Setup], Stepper]


@dataclass(frozen=True)
class Arm:
    """One way of training, by name."""

    name: str
    build: Build
    full_batch_only: bool = False
    changes: tuple[str, ...] = ()
    """Configuration that differs from the method's default, for the record."""
    rank: int = 0
    """When it runs among a case's arms: smaller first."""
    headline_only: bool = False
    """Runs only at the length that its class is judged by."""


def _bare(model: nn.Module, meter: Meter, setup: Setup) -> Stepper:
    base = setup.optimizer(model)
    return Stepper(base, meter, scheduler=setup.scheduler(base))


def _hybrid(
    *,
    filtered: float = 0.5,
    moments: Literal["shrink", "advance"] | None = None,
    **overrides: Any,
) -> Build:
    """Hybridopt with its one default configuration, less the named changes.

    Judged at ``evaluation_weights``, ``filtered`` of the way to the EMA.
    """

    def build(model: nn.Module, meter: Meter, setup: Setup) -> Stepper:
        # Imported here: peers and statistics must work without the package's core.
        from hybridopt.optimizer import HybridPredictOptimizer

        base = setup.optimizer(model)
        settings = {key: value() for key, value in overrides.items()}
        opt = HybridPredictOptimizer(base, model=model, **settings)
        watched: Any = Watch(opt)
        return Stepper(
            watched if moments is None else MomentsAfterMove(watched, moments),
            meter,
            scheduler=setup.scheduler(opt),
            takes_forward=True,
            evaluation=partial(opt.evaluation_weights, filtered) if filtered else None,
        )

    return build


def _wrapped(wrap: Callable[[Optimizer, Setup], Any], *, judged: bool = False) -> Build:
    def build(model: nn.Module, meter: Meter, setup: Setup) -> Stepper:
        base = setup.optimizer(model)
        peer = wrap(base, setup)
        return Stepper(
            peer,
            meter,
            scheduler=setup.scheduler(base),
            evaluation=peer.evaluation if judged else None,
        )

    return build


def _ema_nesterov(base: Optimizer, setup: Setup) -> peers.EMANesterov:
    # The public entry's window: from 15 % to 75 % of the run.
    window = (int(0.15 * setup.steps), int(0.75 * setup.steps))
    return peers.EMANesterov(base, window=window)


def _schedule_free(model: nn.Module, meter: Meter, setup: Setup) -> Stepper:
    from schedulefree import AdamWScheduleFree

    opt = AdamWScheduleFree(
        [p for p in model.parameters() if p.requires_grad],
        lr=setup.lr,
        weight_decay=setup.weight_decay,
        warmup_steps=setup.warmup_steps,
    )
    opt.train()

    @contextlib.contextmanager
    def evaluation():  # type: ignore[no-untyped-def]
        opt.eval()
        try:
            yield
        finally:
            opt.train()

    return Stepper(opt, meter, evaluation=evaluation)


def _prodigy(model: nn.Module, meter: Meter, setup: Setup) -> Stepper:
    from pytorch_optimizer import Prodigy

    opt = Prodigy(
        [p for p in model.parameters() if p.requires_grad],
        lr=1.0,
        weight_decay=setup.weight_decay,
        # As its authors advise wherever the schedule warms up.
        safeguard_warmup=setup.warmup_steps > 0,
    )
    return Stepper(opt, meter, scheduler=setup.scheduler(opt))


def _lbfgs(model: nn.Module, meter: Meter, setup: Setup) -> Stepper:
    return Stepper(peers.IteratedLBFGS(model), meter)


def _ablation(kind: str) -> Any:
    """The configuration value that an ablation sets, by name."""
    from hybridopt import config

    match kind:
        case "corrector":
            return config.ResidualConfig(enabled=True)
        case "corrector with rank 2":
            return config.ResidualConfig(enabled=True, rank=2)
        case "no drift":
            return config.DriftConfig(enabled=False)
        case "no held rates":
            return config.DriftConfig(hold=0.0)
        case "no lead":
            return config.LeadConfig(enabled=False)
        case "no secant":
            return config.SecantConfig(enabled=False)
        case "frozen gains":
            # Gains stay at their first value: a fixed extrapolation of each step.
            return config.GainConfig(rate=0.0)
        case "no relaxation":
            return config.GainConfig(relaxation=0.0)
        case "no headroom":
            return config.GainConfig(boost=0.0, eager=0.0)
        case "at most 16":
            return config.GainConfig(maximum=16.0)
        case "alone too":
            return config.GainConfig(lone_maximum=128.0)
        case "no gains":
            return config.GainConfig(rate=0.0, initial=0.0, minimum=0.0)
        case "every 4 phases":
            return 4
        case "every phase":
            return 1
        case "no steps consumed":
            return 0
    return getattr(config, kind)()


def _hybrid_arm(name: str, field: str, kind: str) -> Arm:
    build = _hybrid(**{field: lambda: _ablation(kind)})
    changes = (f"{field}={kind}",)
    return Arm(f"hybrid:{name}", build, changes=changes, rank=2, headline_only=True)


def _moments_arm(kind: Literal["shrink", "advance"]) -> Arm:
    changes = (f"moments after a move: {kind}",)
    return Arm(
        f"hybrid:moments-{kind}",
        _hybrid(moments=kind),
        changes=changes,
        rank=2,
        headline_only=True,
    )


BASE = Arm("base", _bare, rank=-1)
HYBRID = Arm("hybrid", _hybrid())

ABLATIONS = (
    Arm(
        "hybrid:own-weights",
        _hybrid(filtered=0.0),
        changes=("judged at its own weights",),
        rank=2,
        headline_only=True,
    ),
    Arm(
        "hybrid:ema",
        _hybrid(filtered=1.0),
        changes=("judged at the EMA of its weights",),
        rank=2,
        headline_only=True,
    ),
    _hybrid_arm("prior", "predictor", "Prior"),
    _hybrid_arm("linear", "predictor", "Linear"),
    _hybrid_arm("mlp", "predictor", "MLP"),
    _hybrid_arm("rssm", "predictor", "RSSM"),
    _hybrid_arm("corrector", "residual", "corrector"),
    _hybrid_arm("corrector-rank", "residual", "corrector with rank 2"),
    _hybrid_arm("fixed-horizon", "bandit", "FixedHorizon"),
    _hybrid_arm("folded-only", "max_predict_steps", "no steps consumed"),
    _hybrid_arm("validated", "validation_interval", "every 4 phases"),
    _hybrid_arm("no-gains", "gain", "no gains"),
    _hybrid_arm("frozen-gains", "gain", "frozen gains"),
    _hybrid_arm("no-relaxation", "gain", "no relaxation"),
    _hybrid_arm("no-headroom", "gain", "no headroom"),
    _hybrid_arm("gain-16", "gain", "at most 16"),
    _hybrid_arm("alone", "gain", "alone too"),
    _hybrid_arm("no-drift", "drift", "no drift"),
    _hybrid_arm("no-hold", "drift", "no held rates"),
    _hybrid_arm("no-lead", "lead", "no lead"),
    _hybrid_arm("no-secant", "secant", "no secant"),
    _moments_arm("shrink"),
    _moments_arm("advance"),
)
"""Each changes one part of the default configuration. One of the predictors is the
default itself and must come out equal to it."""


def _peer(name: str, build: Build, *, full_batch_only: bool = False) -> Arm:
    return Arm(name, build, full_batch_only=full_batch_only, rank=1)


PEERS = (
    _peer("ema", _wrapped(lambda base, _: peers.EMAEvaluation(base), judged=True)),
    _peer("lookahead", _wrapped(lambda base, _: peers.Lookahead(base), judged=True)),
    _peer("snoo", _wrapped(lambda base, _: peers.SNOO(base))),
    _peer("ema-nesterov", _wrapped(_ema_nesterov)),
    _peer("extrapolation", _wrapped(lambda base, _: peers.FilteredExtrapolation(base))),
    _peer("hypergradient", _wrapped(lambda base, _: peers.Hypergradient(base))),
    _peer(
        "hypergradient:tensor",
        _wrapped(lambda base, _: peers.Hypergradient(base, per_tensor=True)),
    ),
    _peer("schedule-free", _schedule_free),
    _peer("prodigy", _prodigy),
    _peer("lbfgs", _lbfgs, full_batch_only=True),
)
"""Each with the defaults of its paper; nobody is tuned per task."""

ARMS = {arm.name: arm for arm in (BASE, HYBRID, *PEERS, *ABLATIONS)}
