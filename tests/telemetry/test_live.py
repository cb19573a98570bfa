import io
import math
import sys

import pytest

from hybridopt.errors import HybridError, RecoveryAction
from hybridopt.telemetry.live import (
    PlainDisplay,
    RichDisplay,
    RunProgress,
    open_display,
    plain_line,
)
from tests.telemetry.builders import hybrid_records, predicted, record


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_counts_real_predicted_and_rolled_back_steps():
    progress = RunProgress("hybrid", 30)
    for one in hybrid_records():
        progress.take(None if one.loss_predicted else one.loss, one)
    assert progress.steps == 30
    assert progress.predicted_steps == 18
    assert progress.rolled_back_steps == 1
    assert progress.real_steps == 11
    assert progress.phase == "predict"
    assert progress.done


def test_progress_shows_the_last_measured_loss_not_an_expected_one():
    progress = RunProgress("hybrid", 10)
    progress.take(2.5, record(0, loss=2.5))
    progress.take(None, predicted(1, loss=0.001))
    assert progress.loss == 2.5


def test_progress_eta_is_the_pace_so_far_times_what_is_left():
    progress = RunProgress("bare", 10)
    assert math.isnan(progress.eta_s)
    progress.take(1.0, None)
    progress.take(1.0, None)
    progress.active_s = 3.0
    assert progress.eta_s == pytest.approx(12.0)


def test_plain_line_says_everything_about_a_hybrid_run():
    progress = RunProgress("hybrid", 200, validation_loss=2.25)
    progress.take(2.5, record(0, confidence=0.75))
    progress.take(None, predicted(1))
    progress.active_s = 1.3
    line = plain_line(progress)
    for part in (
        "hybrid",
        "2/200",
        "1%",
        "loss 2.5000",
        "held-out 2.2500",
        "phase predict",
        "confidence 0.75",
        "real 1, predicted 1, rolled back 0",
        "ETA 2:09",
    ):
        assert part in line


def test_plain_line_of_a_bare_run_has_no_hybrid_columns():
    progress = RunProgress("bare", 4)
    progress.take(2.5, None)
    line = plain_line(progress)
    assert "predicted" not in line
    assert "phase" not in line
    assert "held-out -" in line


def test_plain_display_writes_every_twentieth_or_after_five_seconds():
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock=clock)
    progress = display.add("bare", 100)
    for _ in range(100):
        progress.take(1.0, None)
        display.refresh(progress)
    assert len(stream.getvalue().splitlines()) == 20
    slow = display.add("slow", 1000)
    slow.take(1.0, None)
    display.refresh(slow)
    clock.now = 5.0
    display.refresh(slow)
    display.refresh(slow)
    assert len(stream.getvalue().splitlines()) == 21


def test_plain_display_close_writes_what_was_not_said_yet():
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=Clock())
    progress = display.add("bare", 100)
    progress.take(1.0, None)
    display.close()
    display.close()
    assert stream.getvalue().count("bare") == 1


def test_rich_display_draws_both_runs_with_their_counts():
    stream = io.StringIO()
    display = RichDisplay(stream)
    bare, hybrid = display.add("bare", 30), display.add("hybrid", 30)
    for one in hybrid_records():
        bare.take(2.0, None)
        hybrid.take(one.loss, one)
        display.refresh(hybrid)
    display.say("a [bold]note[/bold] as it is")
    display.close()
    text = stream.getvalue()
    assert "a [bold]note[/bold] as it is" in text
    assert text.count("30/30") == 2
    assert "held-out -" in text
    assert "predict, confidence 0.50: 11 real, 18 predicted, 1 rolled back" in text
    assert "done" in text
    assert max(map(len, text.splitlines())) <= 80


def test_open_display_without_a_terminal_writes_lines():
    assert isinstance(open_display(io.StringIO()), PlainDisplay)


def test_live_table_without_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(HybridError, match=r"hybridopt\[demo\]") as caught:
        open_display(io.StringIO(), interactive=True)
    assert caught.value.recovery is RecoveryAction.FIX_CONFIGURATION
