import logging

import pytest
import structlog

from hybridopt.telemetry import events
from hybridopt.types import Phase


@pytest.fixture(autouse=True)
def unconfigured():
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def test_events_of_normal_steps_write_nothing_to_the_console(capfd):
    events.phase_changed(3, Phase.FULL, Phase.PREDICT)
    events.kernels_fallback("cupy", "torch", "no CUDA device")
    events.checkpoint_loaded(7, "predict")
    assert capfd.readouterr() == ("", "")


def test_events_reach_the_standard_logger_while_structlog_is_not_configured(caplog):
    with caplog.at_level(logging.DEBUG, logger="hybridopt"):
        events.phase_changed(3, Phase.FULL, Phase.PREDICT)
        events.rolled_back(4, "loss_sigma=9")
    debug, warning = caplog.records
    assert debug.levelno == logging.DEBUG
    assert "phase_changed step=3 previous=full phase=predict" in debug.getMessage()
    assert warning.levelno == logging.WARNING
    assert "loss_sigma=9" in warning.getMessage()


def test_events_are_structured_when_structlog_is_configured():
    with structlog.testing.capture_logs() as logs:
        events.rolled_back(4, "loss_sigma=9")
        events.predictions_paused(5, "too many rollbacks")
    assert logs == [
        {
            "event": "rolled_back",
            "log_level": "warning",
            "step": 4,
            "reason": "loss_sigma=9",
            "count": 1,
        },
        {
            "event": "predictions_paused",
            "log_level": "warning",
            "step": 5,
            "reason": "too many rollbacks",
        },
    ]


def test_repeated_events_warn_only_at_powers_of_two():
    with structlog.testing.capture_logs() as logs:
        for count in range(1, 1001):
            events.step_skipped(count, "gradient is not finite", count)
    warned = [log["count"] for log in logs if log["log_level"] == "warning"]
    assert warned == [2**power for power in range(10)]
