from __future__ import annotations

import copy
import pickle

import pytest

from hybridopt import errors
from hybridopt.errors import HybridError, RecoveryAction

EXPECTED = {
    "CheckpointError": RecoveryAction.RESTORE_CHECKPOINT,
    "ClosureError": RecoveryAction.FIX_CONFIGURATION,
    "ConfigError": RecoveryAction.FIX_CONFIGURATION,
    "DivergenceError": RecoveryAction.RESTORE_CHECKPOINT,
    "HybridError": RecoveryAction.CONTINUE,
    "KernelUnavailableError": RecoveryAction.FIX_CONFIGURATION,
    "NonFiniteError": RecoveryAction.SKIP_STEP,
}


def test_errors_are_all_known_here() -> None:
    assert set(errors.__all__) == {*EXPECTED, "RecoveryAction"}


@pytest.mark.parametrize("name", EXPECTED)
def test_error_carries_its_message_and_recovery(name: str) -> None:
    error = getattr(errors, name)("lr=-1: must be > 0. Use 1e-3.")
    assert isinstance(error, HybridError)
    assert str(error) == "lr=-1: must be > 0. Use 1e-3."
    assert error.recovery is EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_error_recovery_can_be_set_for_one_instance_only(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("x", recovery=RecoveryAction.ROLL_BACK)
    assert error.recovery is RecoveryAction.ROLL_BACK
    assert kind("y").recovery is EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_error_survives_pickle_and_copy(name: str) -> None:
    error = getattr(errors, name)("x", recovery=RecoveryAction.RESET_PREDICTOR)
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == "x"
        assert twin.recovery is RecoveryAction.RESET_PREDICTOR


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="bad"):
        raise errors.ConfigError("bad")


def test_recovery_actions_can_be_saved_by_value() -> None:
    assert len({a.value for a in RecoveryAction}) == len(RecoveryAction) == 8
    assert all(RecoveryAction(a.value) is a for a in RecoveryAction)
