from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridopt.config import DivergenceConfig, HybridConfig
from hybridopt.errors import CheckpointError, ConfigError, RecoveryAction
from hybridopt.guard import DivergenceMonitor, default_signals
from hybridopt.guard.signals import NonFinite
from hybridopt.types import Level, Observation, SignalReading
from tests.guard.observations import observation


class Stub:
    """A signal that says what its next observation's loss is told to mean."""

    def __init__(self, name: str = "stub", *, every_step: bool = False) -> None:
        self.name = name
        self.every_step = every_step
        self.seen = 0

    def read(self, observation: Observation) -> SignalReading:
        return SignalReading(self.name, Level(int(observation.loss)), self.seen, 0.0)

    def absorb(self, observation: Observation) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if "seen" not in state:
            raise CheckpointError("no 'seen'")
        self.seen = state["seen"]


def limits(**changes: int) -> HybridConfig:
    return HybridConfig(divergence=DivergenceConfig(**changes))


# -- verdicts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "with_move", "without"),
    [
        (Level.OK, RecoveryAction.CONTINUE, RecoveryAction.CONTINUE),
        (
            Level.CAUTION,
            RecoveryAction.SHORTEN_HORIZON,
            RecoveryAction.SHORTEN_HORIZON,
        ),
        (Level.WARNING, RecoveryAction.RETURN_TO_FULL, RecoveryAction.RETURN_TO_FULL),
        (Level.CRITICAL, RecoveryAction.ROLL_BACK, RecoveryAction.CONTINUE),
    ],
)
def test_monitor_turns_the_level_into_an_action(
    level: Level, with_move: RecoveryAction, without: RecoveryAction
) -> None:
    monitor = DivergenceMonitor(HybridConfig(), [Stub()])
    seen = observation(loss=float(level))
    verdict = monitor.judge(seen, can_roll_back=True)
    assert (verdict.level, verdict.action) == (level, with_move)
    assert monitor.judge(seen, can_roll_back=False).action is without


def test_monitor_rolls_back_on_nan_and_skips_without_a_move() -> None:
    monitor = DivergenceMonitor(HybridConfig())
    broken = observation(loss=float("nan"), gradient_norm=float("nan"), finite=False)
    verdict = monitor.judge(broken, can_roll_back=True)
    assert verdict.level is Level.CRITICAL
    assert verdict.action is RecoveryAction.ROLL_BACK
    skipped = monitor.judge(broken, can_roll_back=False)
    assert skipped.action is RecoveryAction.SKIP_STEP
    assert skipped.reason.startswith("non_finite")


def test_monitor_watches_nan_whatever_signals_it_is_given() -> None:
    monitor = DivergenceMonitor(HybridConfig(), [Stub()])
    broken = observation(loss=0.0, finite=False)
    verdict = monitor.judge(broken, can_roll_back=False)
    assert verdict.action is RecoveryAction.SKIP_STEP


def test_monitor_lists_the_worst_reading_first_and_leaves_ok_out() -> None:
    class Mild(Stub):
        def read(self, observation: Observation) -> SignalReading:
            return SignalReading(self.name, Level.CAUTION, 1.0, 0.5)

    class Fine(Stub):
        def read(self, observation: Observation) -> SignalReading:
            return SignalReading(self.name, Level.OK, 0.0, 0.5)

    monitor = DivergenceMonitor(
        HybridConfig(), [Fine("fine"), Mild("mild"), Stub("harsh")]
    )
    verdict = monitor.judge(observation(loss=2.0), can_roll_back=False)
    assert [r.name for r in verdict.readings] == ["harsh", "mild"]
    assert verdict.level is Level.WARNING


def test_monitor_judge_changes_nothing() -> None:
    monitor = DivergenceMonitor(HybridConfig())
    for step in range(30):
        monitor.absorb(observation(step, 2.0 + 0.01 * (step % 3)))
    before = copy.deepcopy(monitor.state_dict())
    for loss in (2.0, 50.0, float("nan")):
        monitor.judge(observation(loss=loss), can_roll_back=True)
    assert monitor.state_dict() == before


def test_monitor_checks_statistics_at_intervals_and_nan_always() -> None:
    steady, always = Stub("steady"), Stub("always", every_step=True)
    monitor = DivergenceMonitor(limits(check_interval_steps=3), [steady, always])
    names = []
    for step in range(6):
        verdict = monitor.judge(observation(step, 1.0), can_roll_back=False)
        names.append([r.name for r in verdict.readings])
        broken = monitor.judge(
            observation(step, 0.0, finite=False), can_roll_back=False
        )
        assert broken.level is Level.CRITICAL
        monitor.absorb(observation(step, 1.0))
    both = ["steady", "always"]
    assert names == [both, ["always"], ["always"], both, ["always"], ["always"]]


def test_monitor_refuses_signals_of_one_name() -> None:
    with pytest.raises(ConfigError, match="'stub' is there twice"):
        DivergenceMonitor(HybridConfig(), [Stub(), Stub()])


# -- rationing rollbacks ---------------------------------------------------------------


@pytest.mark.parametrize("cooldown", [0, 1, 5])
def test_monitor_cooldown_lasts_that_many_real_steps(cooldown: int) -> None:
    monitor = DivergenceMonitor(limits(cooldown_steps=cooldown))
    assert monitor.may_predict(0)
    assert monitor.rolled_back(10) is False
    assert not monitor.may_predict(11)
    without_move = 0
    for step in range(11, 40):
        monitor.real_step()
        if monitor.may_predict(step):
            break
        without_move += 1
    assert without_move == cooldown


def test_monitor_pauses_at_the_bound_and_doubles_the_pause() -> None:
    config = limits(
        max_rollbacks=2, rollback_window_steps=10, pause_steps=20, cooldown_steps=0
    )
    monitor = DivergenceMonitor(config)
    step, pauses = 100, []
    for _ in range(3):
        assert monitor.rolled_back(step) is False
        assert monitor.rolled_back(step + 1) is True
        monitor.real_step()
        start = step + 1
        step = start
        while not monitor.may_predict(step):
            step += 1
        pauses.append(step - start)
    assert pauses == [20, 40, 80]


def test_monitor_forgets_rollbacks_that_left_the_window() -> None:
    config = limits(max_rollbacks=2, rollback_window_steps=10)
    monitor = DivergenceMonitor(config)
    assert [monitor.rolled_back(s) for s in (0, 10, 20, 29)] == [False] * 3 + [True]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(0, 2**16),
)
def test_monitor_never_allows_more_rollbacks_than_the_window_holds(
    most: int, window: int, cooldown: int, pause: int, seed: int
) -> None:
    monitor = DivergenceMonitor(
        limits(
            max_rollbacks=most,
            rollback_window_steps=window,
            cooldown_steps=cooldown,
            pause_steps=pause,
        )
    )
    rng, rollbacks = random.Random(seed), []
    moved = False
    for step in range(300):
        if moved and rng.random() < 0.8:
            monitor.rolled_back(step)
            rollbacks.append(step)
            moved = False
            continue
        monitor.real_step()
        moved = monitor.may_predict(step)
    for first in rollbacks:
        assert sum(first <= s < first + window for s in rollbacks) <= most


def run_with_moves(monitor: DivergenceMonitor, losses: list[float]) -> list[int]:
    """Steps of the rollbacks when a move is made behind every step that allows one.

    A rolled-back step is tried again with the next loss of the list, as new data
    would.
    """
    rollbacks, moved = [], False
    for step, loss in enumerate(losses):
        seen = observation(step, loss)
        verdict = monitor.judge(seen, can_roll_back=moved)
        if verdict.action is RecoveryAction.ROLL_BACK:
            rollbacks.append(step)
            monitor.rolled_back(step)
            moved = False
            continue
        monitor.absorb(seen)
        monitor.real_step()
        moved = monitor.may_predict(step)
    return rollbacks


@pytest.mark.parametrize("cooldown", [0, 5])
@pytest.mark.parametrize("factor", [1.5, 3.0, 1000.0])
def test_monitor_accepts_a_loss_that_steps_up_for_good(
    cooldown: int, factor: float
) -> None:
    rng = random.Random(5)
    losses = [
        (2.0 if step < 200 else 2.0 * factor) * (1 + 0.02 * rng.gauss(0, 1))
        for step in range(1200)
    ]
    config = limits(cooldown_steps=cooldown, pause_steps=50)
    rollbacks = run_with_moves(DivergenceMonitor(config), losses)
    assert rollbacks
    assert rollbacks[0] == 200
    assert len(rollbacks) <= 3
    assert rollbacks[-1] < 300


def test_monitor_starts_statistics_anew_when_the_ration_is_used_up() -> None:
    monitor = DivergenceMonitor(limits(max_rollbacks=2))
    for step in range(60):
        monitor.absorb(observation(step, 2.0 + 0.01 * (step % 5)))
    high = observation(61, 500.0)
    assert monitor.judge(high, can_roll_back=True).action is RecoveryAction.ROLL_BACK
    assert monitor.rolled_back(61) is False
    assert monitor.judge(high, can_roll_back=True).action is RecoveryAction.ROLL_BACK
    assert monitor.rolled_back(62) is True
    assert monitor.judge(high, can_roll_back=True).level is Level.OK
    assert not monitor.may_predict(70)


def test_monitor_leaves_quiet_and_noisy_runs_alone() -> None:
    rng = random.Random(6)
    smooth = [10.0 ** (-6 * step / 1500) for step in range(1500)]
    noisy = [2 + 0.6 * rng.gauss(0, 1) for _ in range(1500)]
    assert run_with_moves(DivergenceMonitor(HybridConfig()), smooth) == []
    assert len(run_with_moves(DivergenceMonitor(HybridConfig()), noisy)) <= 1


# -- state -----------------------------------------------------------------------------


def lived() -> DivergenceMonitor:
    monitor, rng = DivergenceMonitor(limits(max_rollbacks=2, window_steps=16)), None
    rng = random.Random(7)
    for step in range(40):
        monitor.absorb(observation(step, 2 + 0.1 * rng.gauss(0, 1), 1 + rng.random()))
    monitor.rolled_back(41)
    monitor.real_step()
    return monitor


def test_monitor_state_continues_exactly() -> None:
    one = lived()
    other = DivergenceMonitor(limits(max_rollbacks=2, window_steps=16))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.state_dict() == one.state_dict()
    rng = random.Random(8)
    for step in range(42, 80):
        seen = observation(step, 2 + 0.3 * rng.gauss(0, 1), 1 + 20 * rng.random())
        assert one.judge(seen, can_roll_back=True) == other.judge(
            seen, can_roll_back=True
        )
        for monitor in (one, other):
            monitor.absorb(seen)
            monitor.real_step()
        if step == 60:
            assert one.rolled_back(step) == other.rolled_back(step)
        assert one.may_predict(step) == other.may_predict(step)
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize(
    "damage",
    [
        {"absorbed": -1},
        {"rollbacks": "none"},
        {"rollbacks": [1.5]},
        {"cooldown": True},
        {"paused_until": "soon"},
        {"pauses": None},
        {"signals": {}},
        {"extra": 1},
    ],
)
def test_monitor_refuses_broken_state_and_keeps_its_own(
    damage: dict[str, object],
) -> None:
    monitor = lived()
    before = copy.deepcopy(monitor.state_dict())
    with pytest.raises(CheckpointError):
        monitor.load_state_dict({**copy.deepcopy(before), **damage})
    assert monitor.state_dict() == before


def test_monitor_restores_all_signals_when_the_last_one_fails() -> None:
    monitor = lived()
    before = copy.deepcopy(monitor.state_dict())
    fresh = DivergenceMonitor(limits(max_rollbacks=2, window_steps=16)).state_dict()
    fresh["signals"]["oscillation"] = {"window": {"values": [1.0] * 17}}
    with pytest.raises(CheckpointError):
        monitor.load_state_dict(fresh)
    assert monitor.state_dict() == before


def test_default_signals_have_names_of_their_own_and_include_nan() -> None:
    signals = default_signals(HybridConfig())
    assert len({s.name for s in signals}) == 6
    assert any(isinstance(s, NonFinite) for s in signals)
