import io
import json
import sys

import pytest

from hybridopt.demo.presets import PRESETS
from hybridopt.demo.run import DemoOptions, run_demo
from hybridopt.errors import ConfigError, HybridError
from tests.demo.micro import MICRO


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PRESETS, "tiny", MICRO)
    path = tmp_path / "text.txt"
    path.write_bytes(b"Whatever is worth doing is worth doing again & again.\n" * 3000)
    return path


def run(path, tmp_path, **changes):
    values = {
        "preset": "tiny",
        "scenario": "pretrain",
        "text": str(path),
        "steps": 60,
        "device": "cpu",
        "out": str(tmp_path / "out"),
    }
    stream = io.StringIO()
    result = run_demo(DemoOptions(**(values | changes)), stream)
    return result, stream.getvalue()


def test_demo_trains_both_and_reports_what_it_measured(text, tmp_path):
    result, said = run(text, tmp_path)
    (comparison,) = result.comparisons
    assert comparison.bare.evaluations[0].loss == comparison.hybrid.evaluations[0].loss
    assert comparison.bare.backward_calls == 60
    assert len(comparison.hybrid.records) == 60
    page = result.report.read_text(encoding="utf-8")
    for arm in comparison.arms:
        assert f"{arm.final.loss:.4f}" in said
        assert f"{arm.final.loss:.4f}" in page
    assert str(result.report) in said
    assert "bare          60/60 100%" in said
    assert "hybrid        60/60 100%" in said
    numbers = json.loads((tmp_path / "out" / "result.json").read_text())
    assert numbers[0]["arms"][0]["backward_calls"] == 60
    assert (tmp_path / "out" / "metrics-seed0.jsonl").exists()


def test_demo_finetunes_from_its_cached_checkpoint(text, tmp_path):
    options = {"scenario": "finetune", "checkpoint_steps": 10, "seeds": 2}
    result, said = run(text, tmp_path, **options)
    assert "checkpoint: training 10 steps" in said
    assert [c.seed for c in result.comparisons] == [0, 1]
    assert "mean" in said
    assert "would close part of the gap" in said
    start = {c.bare.evaluations[0].loss for c in result.comparisons}
    assert len(start) == 1
    _, again = run(text, tmp_path, **options)
    assert "checkpoint: training" not in again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "distill"}, "finetune, pretrain"),
        ({"steps": 0}, "steps=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"preset": "gpt2"}, "CUDA"),
        ({"preset": "huge"}, "tiny, small, gpt2"),
        ({"text": "/nowhere/at/all"}, "no such file"),
        ({"device": "tpu"}, "cpu or cuda"),
    ],
)
def test_demo_refuses_wrong_options_with_a_way_out(text, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(text, tmp_path, **changes)


def test_demo_without_matplotlib_stops_before_training(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HybridError, match=r"hybridopt\[demo\]"):
        run(text, tmp_path)
