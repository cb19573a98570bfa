"""How the parts of one optimizer are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from hybridopt.closure import requires_closure
from hybridopt.config import HybridConfig
from hybridopt.control import Controller, build_policy
from hybridopt.control.context import CONTEXT_SIZE
from hybridopt.distributed import build_collective, reduction_weights
from hybridopt.dynamics import build_predictor
from hybridopt.guard import DivergenceMonitor
from hybridopt.kernels import select_ops
from hybridopt.leading import Lead
from hybridopt.protocols import Collective
from hybridopt.residuals import build_corrector
from hybridopt.run import Components, Run
from hybridopt.telemetry import MetricsSink
from hybridopt.weights import NoiseMeter, SecantMover, WeightSpace
from hybridopt.weights.flat import supports
from hybridopt.weights.local import shard_share
from hybridopt.weights.secant import affordable_pairs

__all__ = ["build_run"]


def build_run(
    base: torch.optim.Optimizer,
    config: HybridConfig,
    model: nn.Module | None,
    process_group: Any,
    components: Components,
) -> Run:
    """Put the parts together as the configuration says."""
    parameters = [p for g in base.param_groups for p in g["params"] if p.requires_grad]
    device = parameters[0].device if parameters else torch.device("cpu")
    ops = components.ops or select_ops(config.kernels, device)
    space = WeightSpace(base, config, ops)
    collective = build_collective(process_group)
    shares = reduction_weights(
        [shard_share(p) for p in parameters], collective.world_size
    )
    # Without room for drift windows nothing counts on them: no part of the predictor,
    # and no sleep that is light for their sake.
    fitted = config
    if not space.drifts:
        drift = msgspec.structs.replace(config.drift, enabled=False)
        fitted = config.replace(drift=drift)
    predictor = components.predictor or build_predictor(
        fitted, [p.numel() for p in parameters], [p.ndim for p in parameters]
    )
    policy = components.policy or build_policy(
        config.bandit, config.max_predict_steps, CONTEXT_SIZE
    )
    signals = list(components.signals) if components.signals is not None else None
    return Run(
        base=base,
        config=config,
        model=model,
        space=space,
        predictor=predictor,
        controller=Controller(fitted, policy),
        monitor=DivergenceMonitor(config, signals),
        corrector=components.corrector
        or build_corrector(config.residual, config.memory_budget, config.seed),
        collective=collective,
        secant=_secant(config, parameters, collective),
        noise=NoiseMeter(config.secant),
        sink=MetricsSink(config.metrics_path, keep=config.collect_metrics),
        shares=shares,
        enabled=config.enabled,
        lead=Lead(config.lead),
        skips_on=components.skips_on,
        replays=requires_closure(base),
    )


def _secant(
    config: HybridConfig, parameters: Sequence[Tensor], collective: Collective
) -> SecantMover | None:
    """Secant moves where they fit: one process, one dtype and device, small enough."""
    if not (config.enabled and config.secant.enabled) or collective.world_size > 1:
        return None
    if not supports(parameters):
        return None
    size = sum(p.numel() for p in parameters)
    budget = config.memory_budget * 2**20
    pairs = affordable_pairs(config.secant, size, parameters[0].itemsize, budget)
    return SecantMover(pairs, config.secant) if pairs else None
