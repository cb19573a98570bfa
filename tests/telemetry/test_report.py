import re
import sys
from html.parser import HTMLParser

import pytest

from hybridopt.errors import ConfigError, HybridError
from hybridopt.telemetry.plots import forecast_pairs
from hybridopt.telemetry.report import (
    comparison_report,
    metrics_report,
    write_report,
)
from tests.telemetry.builders import (
    ORIGIN,
    comparison,
    hybrid_records,
    predicted,
    record,
)


class Page(HTMLParser):
    """Text, tag counts and references of a page; fails on crossed tags."""

    VOID = frozenset({"meta", "br", "hr", "img", "use", "path", "image", "link"})

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.references, self.labels = "", [], [], []
        self.ids, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.references += [
            values[k] for k in ("src", "href", "xlink:href", "data") if k in values
        ]
        if tag == "svg":
            self.labels.append(values.get("aria-label"))
        if "id" in values:
            self.ids.append(values["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def source():
    return comparison_report([comparison()], ORIGIN)


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_report_contains_the_measured_numbers(page):
    for text in ("30.0", "10.0", "2.0000", "1.9000", "not reached", "3.00x", "120"):
        assert text in page.text


def test_report_loads_nothing_from_anywhere(source, page):
    for reference in page.references:
        assert reference.startswith(("#", "data:image/"))
    assert "http" not in source
    assert "@import" not in source
    assert not {"script", "link", "iframe", "img"} & set(page.tags)


def test_report_escapes_all_text(source, page):
    assert "<i>title" not in source
    assert "demo <i>title</i>" in page.text
    assert "a <fast> machine" in page.text
    assert "loss_sigma=9 (threshold <4>)" in page.text
    assert "cost <b>" in page.text
    assert "--text 'a & b'" in page.text


def test_report_has_every_picture_with_a_text_for_it(page):
    assert len(page.labels) == 5
    assert all(page.labels)
    for word in ("cost", "phase", "expected", "follow each real step", "Gain"):
        assert any(word in label for label in page.labels)


def test_report_pictures_shade_the_phases_and_follow_the_text_color(source, page):
    assert "phase: predict" in page.text
    assert "phase: warm-up" in page.text
    assert "rolled back" in page.text
    assert "#2fa36b" in source
    assert "currentColor" in source
    assert "#010203" not in source
    assert "prefers-color-scheme" in source or "color-scheme: light dark" in source


def test_report_axes_carry_units(page):
    for label in (
        "cost (real steps: forward 1/3, backward 2/3)",
        "held-out loss (nats/byte)",
        "scheduled steps",
        "horizon (steps)",
    ):
        assert label in page.text


def test_report_pictures_do_not_share_clip_paths(source, page):
    clips = re.findall(r'<clipPath id="([^"]+)"', source)
    assert clips
    assert len(set(clips)) == len(clips)


def test_report_names_runs_versions_command_and_events(page):
    for text in ("run bare", "9.9.9", "hybridopt demo", "critical", "roll back"):
        assert text in page.text


def test_report_of_several_seeds_shows_all_of_them():
    text = Page(comparison_report([comparison(), comparison(seed=7)], ORIGIN)).text
    assert "All seeds" in text
    assert "standard deviation" in text


def test_report_says_when_prediction_did_not_pay():
    slow = comparison((3.0, 2.8, 2.6, 2.5), 10)
    assert "Prediction did not pay" in Page(comparison_report([slow], ORIGIN)).text


def test_metrics_report_counts_steps_and_claims_no_speed():
    page = Page(metrics_report(hybrid_records(), ORIGIN))
    assert "says nothing about speed" in page.text
    assert re.search(r"predicted steps\s*18", page.text)
    assert re.search(r"steps in phase warmup\s*3", page.text)
    assert not re.search(r"\d+\.\d+x", page.text)


def test_metrics_report_of_a_run_without_predictions_has_no_forecast_picture():
    page = Page(metrics_report([record(step) for step in range(5)], ORIGIN))
    assert "No predicted step was followed by a measurement" in page.text
    assert "raised no alarm" in page.text


def test_metrics_report_without_records_is_refused():
    with pytest.raises(ConfigError, match="no step records"):
        metrics_report([], ORIGIN)


def test_forecasts_pair_the_last_expectation_with_the_next_measurement():
    records = [
        record(0, loss=3.0),
        predicted(1, loss=2.9),
        predicted(2, loss=2.8),
        record(3, loss=2.6),
        predicted(4, loss=float("nan")),
        record(5, loss=2.5),
        predicted(6, loss=2.4),
    ]
    assert forecast_pairs(records) == [(2.8, 2.6)]


def test_report_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HybridError, match=r"hybridopt\[demo\]"):
        comparison_report([comparison()], ORIGIN)


def test_report_is_written_with_its_directory(tmp_path):
    path = write_report(tmp_path / "a" / "r.html", "<p>ü</p>")
    assert path.read_text(encoding="utf-8") == "<p>ü</p>"
    assert path.is_absolute()
