"""Judges each observation before any weight moves, and rations rollbacks.

Readings of all signals become one level and one action. Trouble that a predicted move
can have caused takes the move back; any other is the base optimizer's own, so only a
step with NaN or inf is kept from it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hybridopt.config import HybridConfig
from hybridopt.errors import CheckpointError, ConfigError, RecoveryAction
from hybridopt.guard.blame import is_to_blame
from hybridopt.guard.signals import NonFinite, default_signals, is_finite
from hybridopt.guard.state import expect_count, expect_keys, mismatch
from hybridopt.history import RunningMoments
from hybridopt.protocols import Signal
from hybridopt.types import Level, Observation, Verdict

__all__ = ["DivergenceMonitor"]

LOSS_MEMORY = 0.9
"""Decay per real step of the mean loss that excess is counted from."""
MAX_DOUBLINGS = 30
"""Doublings of the pause after which it stays as it is; longer than any run."""


class DivergenceMonitor:
    """Combines signals to a verdict and decides when predictions may go on.

    Rollbacks are rationed: within any ``rollback_window_steps`` calls there are at most
    ``max_rollbacks``, each followed by ``cooldown_steps`` real steps without moves. The
    last one allowed starts a pause, twice as long each time, and the statistics start
    anew: if the loss has changed for good (new data), that is the new normal.

    Args:
        config: Thresholds and limits.
        signals: Instead of the default six. NaN and inf are always watched. A signal
            with a true attribute ``every_step`` ignores ``check_interval_steps``.

    Raises:
        ConfigError: Two signals share a name.
    """

    def __init__(
        self, config: HybridConfig, signals: Sequence[Signal] | None = None
    ) -> None:
        self.config = config.divergence
        chosen = default_signals(config) if signals is None else tuple(signals)
        if not any(isinstance(s, NonFinite) for s in chosen):
            chosen = (NonFinite(), *chosen)
        names = [s.name for s in chosen]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(
                f"signals={names}: {twice[0]!r} is there twice, and state is saved by "
                "name. Give each signal a name of its own."
            )
        self.signals = chosen
        self._fresh = {s.name: copy.deepcopy(s.state_dict()) for s in chosen}
        self._usual = RunningMoments(LOSS_MEMORY)
        self._absorbed = 0
        self._rollbacks: list[int] = []
        self._cooldown = 0
        self._paused_until = 0
        self._pauses = 0

    def judge(self, observation: Observation, *, can_roll_back: bool) -> Verdict:
        """Say how bad an observation is and what to do about it. Pure.

        Args:
            observation: What the real step measured.
            can_roll_back: Whether a predicted move was made since the snapshot.

        Returns:
            The worst level and its action: caution shortens the horizon, a warning
            returns to full training, critical rolls back. Without a move to take back,
            NaN and inf skip the step and other critical readings change nothing; nor do
            they behind a move that is not to blame (``is_to_blame``).
        """
        due = self._absorbed % self.config.check_interval_steps == 0
        readings = [
            s.read(observation)
            for s in self.signals
            if due or getattr(s, "every_step", False)
        ]
        bad = sorted(
            (r for r in readings if r.level > Level.OK), key=lambda r: -r.level
        )
        level = bad[0].level if bad else Level.OK
        finite = is_finite(observation)
        if level is Level.CRITICAL and can_roll_back and finite:
            can_roll_back = is_to_blame(observation, self._usual.mean)
        action = _action(level, can_roll_back, finite)
        return Verdict(level, action, tuple(bad))

    def absorb(self, observation: Observation) -> None:
        """Add an accepted observation, one whose step was made, to what is normal."""
        for signal in self.signals:
            signal.absorb(observation)
        self._usual.add(observation.loss)
        self._absorbed += 1

    def rolled_back(self, step: int) -> bool:
        """Register a rollback in call number ``step``.

        Returns:
            Whether it was the last one allowed and predictions are paused now.
        """
        config = self.config
        # ``real_step`` counts the next real step before ``may_predict`` is asked about
        # the move behind it; that step itself is the first of the cool-down.
        self._cooldown = config.cooldown_steps + 1
        oldest = step - config.rollback_window_steps
        self._rollbacks = [s for s in self._rollbacks if s > oldest]
        self._rollbacks.append(step)
        if len(self._rollbacks) < config.max_rollbacks:
            return False
        pause = config.pause_steps * 2 ** min(self._pauses, MAX_DOUBLINGS)
        # However short the pause, one rollback has to leave the window first.
        leaves = self._rollbacks[0] + config.rollback_window_steps
        self._paused_until = max(step + pause, leaves)
        self._pauses += 1
        self._start_anew()
        return True

    def may_predict(self, step: int) -> bool:
        """Whether neither a cool-down nor a pause forbids a move in call ``step``."""
        return self._cooldown == 0 and step >= self._paused_until

    def real_step(self) -> None:
        """Count one real step, before the move behind it is asked about."""
        self._cooldown = max(self._cooldown - 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Signals by name, and the counters."""
        return {
            "signals": {s.name: s.state_dict() for s in self.signals},
            "usual": self._usual.state_dict(),
            "absorbed": self._absorbed,
            "rollbacks": list(self._rollbacks),
            "cooldown": self._cooldown,
            "paused_until": self._paused_until,
            "pauses": self._pauses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            CheckpointError: Other signals or broken values; nothing was changed.
        """
        owner = type(self).__name__
        keys = ("absorbed", "rollbacks", "cooldown", "paused_until", "pauses")
        expect_keys(owner, state, ("signals", "usual", *keys))
        expect_keys(owner, state["usual"], tuple(self._usual.state_dict()))
        expect_keys(owner, state["signals"], tuple(s.name for s in self.signals))
        if not isinstance(state["rollbacks"], list):
            raise mismatch(owner, "rollbacks: must be a list of steps")
        rollbacks = [expect_count(owner, "rollbacks", s) for s in state["rollbacks"]]
        absorbed, cooldown, paused_until, pauses = (
            expect_count(owner, k, state[k]) for k in keys if k != "rollbacks"
        )
        self._load_signals(state["signals"])
        self._usual.load_state_dict(state["usual"])
        self._absorbed = absorbed
        self._rollbacks = rollbacks
        self._cooldown = cooldown
        self._paused_until = paused_until
        self._pauses = pauses

    def _load_signals(self, states: dict[str, Any]) -> None:
        """Load all signals or none."""
        before = {s.name: copy.deepcopy(s.state_dict()) for s in self.signals}
        try:
            for signal in self.signals:
                signal.load_state_dict(states[signal.name])
        except CheckpointError:
            for signal in self.signals:
                signal.load_state_dict(before[signal.name])
            raise

    def _start_anew(self) -> None:
        """Forget what was normal."""
        for signal in self.signals:
            signal.load_state_dict(copy.deepcopy(self._fresh[signal.name]))


def _action(level: Level, can_roll_back: bool, finite: bool) -> RecoveryAction:
    """The table of levels and actions."""
    if not finite:
        return RecoveryAction.ROLL_BACK if can_roll_back else RecoveryAction.SKIP_STEP
    match level:
        case Level.OK:
            return RecoveryAction.CONTINUE
        case Level.CAUTION:
            return RecoveryAction.SHORTEN_HORIZON
        case Level.WARNING:
            return RecoveryAction.RETURN_TO_FULL
        case Level.CRITICAL:
            if can_roll_back:
                return RecoveryAction.ROLL_BACK
            return RecoveryAction.CONTINUE
