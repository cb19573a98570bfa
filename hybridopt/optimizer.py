"""``HybridPredictOptimizer``: one ``step()`` from top to bottom, torch's contract.

A step reads the plan, runs the closure if the plan needs it, and hands over to the
phase (``phases.py``), which judges, moves, and leaves the plan for the next step. All
state is in one ``Run`` (``run.py``), because frameworks call these methods with proxies
as ``self``; the optimizer's own containers are the base's.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from hybridopt import phases
from hybridopt.assembly import build_run
from hybridopt.calling import bare_step, base_step, call_framework, run_closure
from hybridopt.checkpoint import (
    BLOB_KEY,
    load_into,
    require_state_dict,
    save_into,
)
from hybridopt.closure import Closure, Evaluation, insists_on_call, require_callable
from hybridopt.config import HybridConfig
from hybridopt.errors import ConfigError
from hybridopt.gradients import has_gradients, has_work
from hybridopt.measuring import complete_record, settle, settle_unseen
from hybridopt.recording import record_step
from hybridopt.run import Components, Run
from hybridopt.statistics import summarize
from hybridopt.types import Phase, StepRecord

__all__ = ["HybridPredictOptimizer"]


class HybridPredictOptimizer(Optimizer):
    """Wraps a base optimizer and replaces real gradients by predicted moves.

    Args:
        base_optimizer: Any ``torch.optim.Optimizer``, new or trained.
        config: Every knob; the default is meant to be right.
        model: The module being trained: lets rollbacks restore its buffers (BatchNorm
            statistics) and permits forward-only validations.
        process_group: Ranks that must agree; the default group where one exists.
        components: Parts to use in place of those that ``config`` would build.
        **overrides: Fields of ``HybridConfig`` to change.

    Raises:
        ConfigError: A value breaks its rule, or ``base_optimizer`` is no optimizer.
    """

    # torch reads these on the class or instance; they are the base's here.
    base: Optimizer
    config: HybridConfig

    def __init__(
        self,
        base_optimizer: Optimizer,
        config: HybridConfig | None = None,
        *,
        model: nn.Module | None = None,
        process_group: Any = None,
        components: Components | None = None,
        **overrides: Any,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise ConfigError(
                f"base_optimizer={type(base_optimizer).__name__}: must be a "
                "torch.optim.Optimizer. Pass for example "
                "torch.optim.AdamW(model.parameters())."
            )
        if config is not None and not isinstance(config, HybridConfig):
            raise ConfigError(
                f"config={config!r} of type {type(config).__name__}: must be a "
                "HybridConfig. Use HybridConfig.from_dict for plain values."
            )
        config = (config or HybridConfig()).replace(**overrides)
        self._build(base_optimizer, config, model, process_group, components)

    def _build(
        self,
        base: Optimizer,
        config: HybridConfig,
        model: nn.Module | None,
        process_group: Any,
        components: Components | None,
    ) -> None:
        self.base = base
        # Optimizer.__init__ would replace the base's groups and state with empty ones;
        # __setstate__ makes the hook registries and patches ``step`` for profiling.
        Optimizer.__setstate__(self, {})
        self.config = config
        self._model = model
        self._process_group = process_group
        self._components = components or Components()
        self._run = self._assemble()
        if config.enabled:
            for group in base.param_groups:
                group.setdefault(BLOB_KEY, "")
            if base.state:
                self._run.space.allocate()

    def _assemble(self) -> Run:
        """A new run of the same parts; what was learned so far is not in it."""
        return build_run(
            self.base, self.config, self._model, self._process_group, self._components
        )

    # -- one training step --------------------------------------------------------

    # Decisions are host code: compiled around, not into. A compiled model inside the
    # closure stays compiled. Torch's own optimizers use the same lazy decorator;
    # ``torch.compiler.disable`` would import the compiler with this module.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One training step, real or predicted.

        Args:
            closure: Returns the loss (forward form), or clears gradients, runs forward
                and backward (classic form). None: gradients are already in ``p.grad``,
                or the step is predicted and needs none.

        Returns:
            The closure's result on real steps; a detached 0-dim tensor with the
            expected loss on predicted steps; None for a real ``step()``.

        Raises:
            ClosureError: The closure gave nothing that a step can be made of. Weights,
                state and phase are as before.
        """
        run = self._run
        require_callable(closure)
        if not run.enabled:
            return bare_step(run, closure)
        run.start_clock()
        # Groups may have changed since the last step.
        run.space.refresh()
        busy = run.counters.closure_s + run.counters.base_s
        plan = run.controller.plan
        evaluation: Evaluation | None = None
        if closure is not None and insists_on_call(closure):
            evaluation = call_framework(run, closure)
            needs_gradient = has_gradients(run, plan.runs_backward)
            if plan.runs_backward and not needs_gradient:
                return evaluation.result  # the framework skipped this batch
            run.counters.backward_calls += int(needs_gradient)
        else:
            # Gradients that the user made always win over a prediction.
            needs_gradient = plan.runs_backward or has_gradients(run, False)
            if needs_gradient and closure is not None:
                evaluation = run_closure(run, closure)
        if needs_gradient:
            if closure is None and not has_work(run):
                return None
            loss = None if evaluation is None else evaluation.loss
            run.forward_form = evaluation is not None and evaluation.forward_form
            done = phases.real_step(run, loss, base_step(run, closure, evaluation))
            result = None if evaluation is None else evaluation.result
        elif plan.phase is Phase.CORRECT and closure is not None and evaluation is None:
            done = phases.validated_step(run, closure)
            result = torch.tensor(done.loss)
        elif plan.phase is Phase.CORRECT:
            # A loop without closures cannot be validated by a forward pass.
            run.controller.advance_validated()
            return None if evaluation is None else evaluation.result
        else:
            done = phases.predicted_step(run)
            # None where no loss was ever seen: schedulers must not be fed NaN.
            result = torch.tensor(done.loss) if math.isfinite(done.loss) else None
        record_step(run, plan.phase, plan.arm, done, busy)
        return result

    # -- what users ask -----------------------------------------------------------

    @property
    def needs_backward(self) -> bool:
        """False when the next ``step()`` is predicted: skip batch, forward, backward.

        Pure, and stable until the next ``step()``, over all micro-batches of a step. A
        loop that asks cannot be validated by a forward pass, so Correct is real there.
        """
        run = self._run
        return not run.enabled or run.controller.plan.phase is not Phase.PREDICT

    @property
    def phase(self) -> Phase:
        """Phase of the next step."""
        return self._run.controller.plan.phase

    @property
    def last_step(self) -> StepRecord | None:
        """Record of the last step; None before the first.

        Where real steps do not wait for their numbers, asking does.
        """
        complete_record(self._run)
        return self._run.last_step

    def statistics(self) -> dict[str, Any]:
        """Totals and rates since the start; see ``hybridopt.statistics.summarize``.

        Where steps passed unseen on a device, asking waits for it.
        """
        settle_unseen(self._run)
        return summarize(self._run)

    def evaluation_weights(self, share: float = 0.5) -> AbstractContextManager[None]:
        """Inside: the noise-filtered weights. On exit: the training weights, bit for
        bit. Without filtered drift (memory="low") the weights stay as they are.

        Args:
            share: In [0, 1]: how far from the weights towards their EMA. Half-way
                filters most of the noise and lags half as much; 1 is the EMA itself.

        Raises:
            ConfigError: A share outside of that range.
        """
        if not isinstance(share, (int, float, np.number)) or not 0.0 <= share <= 1.0:
            raise ConfigError(
                f"share={share!r}: must be a number in [0, 1]. Use 1 for the EMA, 0.5 "
                "for the weights half-way to it."
            )
        return self._run.space.averaged(share)

    def train_off(self) -> None:
        """Stop predicting for good: from here on, exactly the base optimizer."""
        run = self._run
        settle(run)
        settle_unseen(run)
        run.controller.after_rollback()
        run.enabled = False

    def close(self) -> None:
        """Flush and close the event sinks."""
        complete_record(self._run)
        self._run.sink.close()

    @property
    def run(self) -> Run:
        """The parts behind this optimizer, for extensions and tests."""
        return self._run

    # -- the base's containers ----------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups; a property, because a load replaces the list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults, which schedulers read."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base's groups."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; prediction starts over in warm-up.

        The learned state is per tensor, so it cannot outlive a change of the tensors.
        """
        run = self._run
        settle(run)
        settle_unseen(run)
        self.base.add_param_group(param_group)
        fresh = self._assemble()
        fresh.counters, fresh.enabled = run.counters, run.enabled
        run.adopt(fresh)
        if run.enabled:
            for group in self.base.param_groups:
                group.setdefault(BLOB_KEY, "")
            run.space.forget()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather a sharded base's state (ZeroRedundancyOptimizer) on rank ``to``.

        Nothing to do for other bases: Lightning looks for the name, not for the kind,
        and calls it before every checkpoint.
        """
        consolidate = getattr(self.base, "consolidate_state_dict", None)
        if consolidate is not None:
            consolidate(to=to)

    def __repr__(self) -> str:
        groups = []
        for index, group in enumerate(self.base.param_groups):
            shown = {k: v for k, v in sorted(group.items()) if k not in _HIDDEN}
            lines = "".join(f"\n    {k}: {v}" for k, v in shown.items())
            groups.append(f"\nParameter Group {index}{lines}")
        return (
            f"{type(self).__name__}({type(self.base).__name__} ({''.join(groups)}\n))"
        )

    # -- saving and restoring -----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict with the hybrid state inside; no key of its own.

        Loads with ``weights_only=True``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        settle_unseen(self._run)
        state = save_into(self._run)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, or start in warm-up from a bare base's.

        Raises:
            CheckpointError: Corrupt, truncated, of another version, or of another
                model. Nothing was changed.
        """
        require_state_dict(state_dict)
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state)
            state = state if replaced is None else replaced
        self._run.adopt(load_into(self._run, self._assemble, state))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # An explicit list: the instance may carry a scheduler's patched ``step``, which
        # is bound to this very object. Like torch's own optimizers, copies drop hooks.
        return {
            "base": self.base,
            "config": self.config,
            "model": self._model,
            "components": self._components,
            "hybrid": self._run.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" not in state:
            # The base's load_state_dict ends here for repairs of old checkpoints.
            self.base.__setstate__(state)
            return
        self._build(
            state["base"], state["config"], state["model"], None, state["components"]
        )
        self._run.load_state_dict(state["hybrid"])

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridPredictOptimizer:
        import copy

        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return clone


_HIDDEN = frozenset({"params", BLOB_KEY})
