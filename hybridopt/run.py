"""Everything mutable behind one optimizer, held in one object.

Frameworks call the optimizer's methods with proxies as ``self``; what such a method
assigned on ``self`` would be lost. So the optimizer assigns nothing and all state is
here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from hybridopt.config import HybridConfig
from hybridopt.control import Controller
from hybridopt.distributed import (
    any_rank,
    is_first,
    reduction_weights,
    require_same_tensors,
)
from hybridopt.errors import CheckpointError
from hybridopt.guard import DivergenceMonitor
from hybridopt.history import RunningMoments
from hybridopt.holding import RateHold
from hybridopt.leading import Lead
from hybridopt.pending import Pending
from hybridopt.protocols import (
    Collective,
    Corrector,
    HorizonPolicy,
    Ops,
    Predictor,
    Signal,
)
from hybridopt.telemetry import MetricsSink
from hybridopt.types import StepRecord
from hybridopt.unseen import Unseen
from hybridopt.weights import NoiseMeter, SecantMover, WeightSpace
from hybridopt.weights.local import shard_share
from hybridopt.weights.module_buffers import list_buffers

__all__ = ["Components", "Counters", "Run"]


@dataclass(frozen=True, slots=True)
class Components:
    """Parts to use instead of those that the configuration would build."""

    predictor: Predictor | None = None
    policy: HorizonPolicy | None = None
    signals: Sequence[Signal] | None = None
    corrector: Corrector | None = None
    ops: Ops | None = None
    skips_on: tuple[str, ...] = ("cuda",)
    """Device types on which a fused base is left to skip bad steps by itself, so that
    no real step waits for its own numbers. On the CPU nothing is gained by it."""


@dataclass(slots=True)
class Counters:
    """Totals since the start of training; saved with it."""

    steps: int = 0
    real_steps: int = 0
    predicted_steps: int = 0
    validated_steps: int = 0
    folded_moves: int = 0
    secant_moves: int = 0
    rolled_back_steps: int = 0
    skipped_steps: int = 0
    closure_calls: int = 0
    backward_calls: int = 0
    closure_s: float = 0.0
    base_s: float = 0.0
    bookkeeping_s: float = 0.0


@dataclass(slots=True)
class Run:
    """The parts of one optimizer and what changes as it runs."""

    base: torch.optim.Optimizer
    config: HybridConfig
    model: nn.Module | None
    space: WeightSpace
    predictor: Predictor
    controller: Controller
    monitor: DivergenceMonitor
    corrector: Corrector
    collective: Collective
    secant: SecantMover | None
    noise: NoiseMeter
    sink: MetricsSink
    shares: Tensor
    """(L, 1) weights of local sums in the global ones."""
    enabled: bool
    lead: Lead
    counters: Counters = field(default_factory=Counters)
    hold: RateHold = field(default_factory=RateHold)
    unseen: Unseen = field(default_factory=Unseen)
    predictor_error: RunningMoments = field(
        default_factory=lambda: RunningMoments(0.95)
    )
    """|loss - expected| / |loss| of the loss forecasts."""
    last_step: StepRecord | None = None
    pending: Pending | None = None
    """The last real step, as long as its numbers have not been taken in."""
    skips_on: tuple[str, ...] = ("cuda",)
    replays: bool = False
    """Whether the base's step insists on a closure; it gets one that replays."""
    last_loss: float = float("nan")
    forward_form: bool = False
    """Whether the last real step came from a forward closure."""
    consumed: list[tuple[TensorWeakRef, int]] = field(default_factory=list)
    """The gradients that the last real step used up, each with its version."""
    settled: bool = False
    """Whether ranks were compared and ``shares`` follows how parameters are sharded."""
    refused: bool = False
    """Whether this rank refused a move, as not finite, since the last real step."""
    buffers: list[Tensor] = field(default_factory=list)
    """Model buffers as they were when the anchor was set."""
    secant_loss: float = float("nan")
    """Loss at the point that the secant mover recorded last."""
    secant_off: bool = False
    """Whether the loss turned out too noisy for secant moves."""
    started_s: float = 0.0
    known_rates: tuple[Any, Tensor] | None = None
    """What ``rates`` was made from, and its result."""

    def adopt(self, other: Run) -> None:
        """Become ``other``; whoever holds this object sees the new run."""
        for name in Run.__dataclass_fields__:
            setattr(self, name, getattr(other, name))

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(iter(self.space.parameters())).device

    @property
    def decays(self) -> bool:
        """Whether the base shrinks weights besides following the gradient."""
        return any(bool(g.get("weight_decay")) for g in self.base.param_groups)

    # -- rates ---------------------------------------------------------------------

    def rates(self) -> Tensor:
        """(L,) learning rate of every trainable parameter, now; not to be changed."""
        groups = self.base.param_groups
        key: list[Any] = [len(self.space.parameters())]
        key += [(len(g["params"]), float(g["lr"])) for g in groups]
        if self.known_rates is None or self.known_rates[0] != key:
            values = [
                float(g["lr"]) for g in groups for p in g["params"] if p.requires_grad
            ]
            self.known_rates = (key, torch.tensor(values, dtype=torch.float64))
        return self.known_rates[1]

    def top_rate(self) -> float:
        """The largest of ``rates``; nan if one of them is, 0 if there are none.

        Asked for at every step, where a tensor would cost more than all the rest.
        """
        used = [
            float(g["lr"])
            for g in self.base.param_groups
            if any(p.requires_grad for p in g["params"])
        ]
        return math.nan if any(map(math.isnan, used)) else max(used, default=0.0)

    # -- buffers -------------------------------------------------------------------

    def keep_buffers(self) -> None:
        """Remember the model's buffers beside the anchor."""
        if self.model is not None:
            self.buffers = [b.detach().clone() for b in list_buffers(self.model)]

    def restore_buffers(self) -> None:
        """Give the model its buffers back, bit for bit."""
        if self.model is None or not self.buffers:
            return
        with torch.no_grad():
            for buffer, kept in zip(
                list_buffers(self.model), self.buffers, strict=True
            ):
                buffer.copy_(kept)

    # -- gradients that were used up -------------------------------------------------

    def mark_consumed(self) -> None:
        """Remember which gradients belong to the real step just taken."""
        # Weak references, because a freed gradient's id is given to the next one.
        self.consumed = [
            (TensorWeakRef(p.grad), p.grad._version)
            for p in self.space.parameters()
            if p.grad is not None
        ]

    def fresh_gradients(self) -> bool:
        """Whether the user produced gradients since the last real step."""
        present = [p.grad for p in self.space.parameters() if p.grad is not None]
        if len(present) != len(self.consumed):
            return bool(present)
        return any(
            reference() is not gradient or version != gradient._version
            for gradient, (reference, version) in zip(
                present, self.consumed, strict=True
            )
        )

    def clear_gradients(self) -> None:
        """Leave no gradient behind a predicted step."""
        for p in self.space.parameters():
            p.grad = None
        self.consumed = []

    # -- ranks -----------------------------------------------------------------------

    def settle(self) -> None:
        """Compare the ranks' parameters and weigh their sums, at the first real step.

        Not at construction: frameworks shard parameters after the optimizer is built.

        Raises:
            ConfigError: Ranks wrap different lists of parameters.
        """
        if self.settled:
            return
        parameters = self.space.parameters()
        require_same_tensors(self.collective, [p.shape for p in parameters])
        self.shares = reduction_weights(
            [shard_share(p) for p in parameters], self.collective.world_size
        )
        self.settled = True

    @property
    def sharded(self) -> bool:
        """Whether some parameter is spread over ranks, so that local sums differ."""
        return self.collective.world_size > 1 and any(
            hasattr(p, "placements") for p in self.space.parameters()
        )

    def _whole_slopes(self, state: dict[str, Any]) -> dict[str, Any]:
        """Weight space's state with its pending local slopes summed over ranks.

        One file serves every rank, so it must not hold one rank's share. A collective,
        but only where saving is one anyway: under sharding every rank takes part.
        """
        if not self.sharded:
            return state
        slopes = [
            [rows, self.collective.sum(values * self.shares[rows, 0].to(values.dtype))]
            for rows, values in state["slopes"]
        ]
        return {**state, "slopes": slopes}

    def _own_slopes(self, state: dict[str, Any]) -> dict[str, Any]:
        """Undo ``_whole_slopes``: the first rank holds the whole sum, the rest zero."""
        if not self.sharded:
            return state
        weights = reduction_weights(
            [shard_share(p) for p in self.space.parameters()],
            self.collective.world_size,
        )
        first = float(is_first(self.collective))
        slopes = [
            [rows, values * first / weights[rows, 0].to(values.dtype)]
            for rows, values in state["slopes"]
        ]
        return {**state, "slopes": slopes}

    def _whole_lead(self, state: dict[str, Any]) -> dict[str, Any]:
        """The lead's state with what this rank measured summed over ranks, likewise."""
        if not self.sharded or state["unshared"] is None:
            return state
        return {**state, "unshared": self.collective.sum(state["unshared"])}

    def _own_lead(self, state: dict[str, Any]) -> dict[str, Any]:
        """Undo ``_whole_lead``: the first rank holds the whole sum, the rest zero."""
        unshared = state.get("unshared")
        if not self.sharded or unshared is None:
            return state
        return {**state, "unshared": unshared * float(is_first(self.collective))}

    # -- time ----------------------------------------------------------------------

    def start_clock(self) -> None:
        """Begin one call's bookkeeping time."""
        self.started_s = time.perf_counter()

    # -- state ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides tensors in ``state[p]``."""
        counters = self.counters
        return {
            "size": int(self.shares.shape[0]),
            "enabled": self.enabled,
            "space": self._whole_slopes(self.space.state_dict()),
            "predictor": self.predictor.state_dict(),
            "predictor_kind": type(self.predictor).__name__,
            "controller": self.controller.state_dict(),
            "monitor": self.monitor.state_dict(),
            "corrector": self.corrector.state_dict(),
            "secant": None if self.secant is None else self.secant.state_dict(),
            "noise": self.noise.state_dict(),
            "counters": {
                k: getattr(counters, k) for k in Counters.__dataclass_fields__
            },
            "predictor_error": self.predictor_error.state_dict(),
            "last_loss": self.last_loss,
            "secant_loss": self.secant_loss,
            "secant_off": self.secant_off,
            "refused": any_rank(self.collective, self.refused)
            if self.sharded
            else self.refused,
            "pending": None if self.pending is None else self.pending.state_dict(),
            "forward_form": self.forward_form,
            "hold": self.hold.state_dict(),
            "lead": self._whole_lead(self.lead.state_dict()),
            "unseen": self.unseen.state_dict(self.space.parameters()),
            "buffers": [b.cpu() for b in self.buffers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore into freshly built parts.

        Raises:
            CheckpointError: Another number of tensors or another kind of predictor.
        """
        size = int(self.shares.shape[0])
        if state["size"] != size:
            raise CheckpointError(
                f"checkpoint of {state['size']} parameter tensors: this optimizer has "
                f"{size}. Build the same model and parameter groups before loading."
            )
        if state["predictor_kind"] != type(self.predictor).__name__:
            raise CheckpointError(
                f"checkpoint with a {state['predictor_kind']}: this optimizer is "
                f"configured for {type(self.predictor).__name__}. Load with the "
                "configuration that it was saved with."
            )
        if (state["secant"] is None) != (self.secant is None):
            raise CheckpointError(
                "checkpoint and configuration disagree on secant moves. Load with the "
                "secant and memory_budget settings that it was saved with."
            )
        self.enabled = bool(state["enabled"])
        self.space.load_state_dict(self._own_slopes(state["space"]))
        self.predictor.load_state_dict(state["predictor"])
        self.controller.load_state_dict(state["controller"])
        self.monitor.load_state_dict(state["monitor"])
        self.corrector.load_state_dict(state["corrector"])
        if self.secant is not None:
            self.secant.load_state_dict(state["secant"], self.device)
        self.noise.load_state_dict(state["noise"])
        for key in Counters.__dataclass_fields__:
            setattr(self.counters, key, state["counters"][key])
        self.predictor_error.load_state_dict(state["predictor_error"])
        self.last_loss = float(state["last_loss"])
        self.secant_loss = float(state["secant_loss"])
        self.secant_off = bool(state["secant_off"])
        self.refused = bool(state.get("refused", False))
        pending = state.get("pending")
        self.pending = None if pending is None else Pending.from_state(pending)
        self.forward_form = bool(state["forward_form"])
        if "hold" in state:
            self.hold.load_state_dict(state["hold"])
        if "lead" in state:
            self.lead.load_state_dict(self._own_lead(state["lead"]))
        if "unseen" in state:
            self.unseen.load_state_dict(state["unseen"], self.space.parameters())
        buffers = [] if self.model is None else list_buffers(self.model)
        kept = state["buffers"]
        self.buffers = (
            [k.to(b.device) for k, b in zip(kept, buffers, strict=True)]
            if len(kept) == len(buffers)
            else []
        )
        self.consumed = []
