"""The command line, from arguments to result files, on the smallest case."""

from __future__ import annotations

import json

import pytest

from benchmarks import cli
from benchmarks.cases import CASES, select
from benchmarks.plots import draw
from benchmarks.runner import Point, Run
from benchmarks.suite import CaseResult
from benchmarks.summary import (
    TARGETS,
    against_default,
    arm_figures,
    class_figures,
    same_steps,
)
from benchmarks.tables import document

SMALL = ["--seeds", "1", "--step-scale", "0.01", "--budgets", "0.5,1", "--no-plots"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    arguments = ["run", "control-minimax", "--arms", "base,ema", *SMALL]
    assert cli.main([*arguments, "--out", str(folder)]) == 0
    return folder


def test_run_writes_json_and_markdown(results):
    assert sorted(p.suffix for p in results.iterdir()) == [".json", ".md"]
    values = json.loads(next(results.glob("*.json")).read_text())
    for key in ("command", "commit", "seeds", "hardware", "versions", "date"):
        assert values["meta"][key]
    runs = values["cases"][0]["runs"]
    assert [(r["arm"], r["fraction"]) for r in runs] == [
        ("base", 0.5), ("base", 1.0), ("ema", 1.0),
    ]  # fmt: skip
    assert all(r["backwards"] == r["steps"] for r in runs)


def cut(results, tmp_path, **changes):
    """A copy of the results whose second seed was cut behind its first run."""
    source = next(results.glob("*.json"))
    values = json.loads(source.read_text())
    values["meta"].update(changes)
    runs = values["cases"][0]["runs"]
    # A mark, to tell what was kept from what was made again.
    runs[0]["final_loss"] = 123.0
    runs.append({**runs[0], "seed": 1})
    copy = tmp_path / "cut.v1.json"
    copy.write_text(json.dumps(values))
    return copy


AGAIN = ["run", "control-minimax", "--arms", "base,ema", "--seeds", "2", *SMALL[2:]]


def test_a_run_that_was_cut_goes_on_in_its_file(results, tmp_path, capsys):
    copy = cut(results, tmp_path)
    assert cli.main([*AGAIN, "--resume", str(copy)]) == 0
    values = json.loads(copy.read_text())
    runs = values["cases"][0]["runs"]
    assert [(r["seed"], r["arm"], r["fraction"]) for r in runs] == [
        (0, "base", 0.5), (0, "base", 1.0), (0, "ema", 1.0),
        (1, "base", 0.5), (1, "base", 1.0), (1, "ema", 1.0),
    ]  # fmt: skip
    assert [r["final_loss"] == 123.0 for r in runs] == [True, *[False] * 5]
    assert values["meta"]["sittings"] == 2
    assert values["cases"][0]["missing"] == []
    assert "in 2 sittings" in (tmp_path / "cut.v1.md").read_text()


def test_another_version_is_not_resumed(results, tmp_path, capsys):
    copy = cut(results, tmp_path, commit="0ldc0de")
    before = copy.read_text()
    with pytest.raises(SystemExit):
        cli.main([*AGAIN, "--resume", str(copy)])
    assert "commit '0ldc0de'" in capsys.readouterr().err
    assert copy.read_text() == before


def test_report_rebuilds_the_same_table(results, capsys):
    assert cli.main(["report", str(next(results.glob("*.json")))]) == 0
    document = next(results.glob("*.md")).read_text()
    assert capsys.readouterr().out.strip() == document.strip()


def test_case_names_alone_mean_run(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_run", lambda parsed: asked.append(parsed.cases) or 0)
    assert cli.main(["control-minimax"]) == cli.main(["run", "controls"]) == 0
    assert cli.main([]) == 0
    assert asked == [["control-minimax"], ["controls"], []]


def test_list_names_every_case(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CASES)


def test_tune_prints_one_line_per_rate(capsys):
    rates = ["--rates", "0.001,0.01"]
    cli.main(
        ["tune", "control-minimax", *rates, "--seeds", "1", "--step-scale", "0.01"]
    )
    assert capsys.readouterr().out.count("control-minimax") == 2


@pytest.mark.parametrize(
    "arguments",
    [["run", "no-such-case"], ["run", "control-minimax", "--arms", "no-such-arm"]],
)
def test_wrong_names_end_with_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "no-such" in capsys.readouterr().err


def test_every_class_has_a_case_at_quick_scale():
    families = {case.family for case in select([], "quick")}
    assert families >= set(TARGETS)


def test_select_by_exact_name_takes_only_that_case():
    assert [c.name for c in select(["pretrain-wsd"], "quick")] == ["pretrain-wsd"]
    assert len(select(["controls"], "quick")) == 7


def finished(arm: str, fraction: float, steps: int, backwards: int, loss: float) -> Run:
    run = Run("case", arm, 0, fraction, steps, 1e-3)
    run.backwards = run.forwards = backwards
    run.cost, run.wall_s = float(backwards), backwards * 0.1
    run.process_s = run.cost
    run.final_loss = loss
    run.done = steps
    run.reached = [run.cost, run.wall_s, run.process_s]
    run.points = [Point(steps, run.cost, run.wall_s, run.process_s, loss)]
    return run


def example(headline: float = 1.0) -> CaseResult:
    runs = [
        finished("base", f, round(100 * f), round(100 * f), 4 - f) for f in (0.5, 1, 2)
    ]
    runs.append(finished("hybrid", 1.0, 100, 15, 3.0))
    return CaseResult(
        "case", "fine-tuning, conservative", "schedule", headline, runs=runs
    )


def test_figures_of_a_known_case():
    hybrid = next(f for f in arm_figures(example()) if f.arm == "hybrid")
    assert hybrid.backward_reduction == pytest.approx(0.85)
    assert hybrid.cost_speedup.value == pytest.approx(100 / 15)
    assert hybrid.time_speedup("wall").value == pytest.approx(100 / 15)
    assert hybrid.base_loss == 3.0


def test_class_verdict_compares_with_the_target():
    (passed,) = class_figures([example()], "hybrid")
    assert passed.verdict == "pass"
    slower = example()
    slower.runs[-1] = finished("hybrid", 1.0, 100, 50, 3.0)
    (failed,) = class_figures([slower], "hybrid")
    assert failed.verdict == "fail"


def test_verdict_is_by_the_clock_of_the_machine():
    shared = example()
    shared.runs[-1].process_s = 50.0
    assert class_figures([shared], "hybrid")[0].verdict == "pass"
    shared.clock = "process"
    assert class_figures([shared], "hybrid")[0].verdict == "fail"


def test_only_the_headline_length_is_judged():
    shorter = example(headline=0.5)
    shorter.runs.append(finished("hybrid", 0.5, 50, 40, 3.5))
    figures = class_figures([shorter], "hybrid")
    assert [(f.fraction, f.headline) for f in figures] == [(1.0, False), (0.5, True)]
    assert [f.verdict for f in figures] == ["pass", "fail"]


def test_a_failed_run_fails_its_class():
    broken = example()
    broken.case = "broken"
    broken.runs[-1].failure = "RuntimeError: broke"
    (figures,) = class_figures([example(), broken], "hybrid")
    assert figures.lost == ("broken",)
    assert figures.verdict == "fail"


def test_same_steps_asks_for_fewer_backwards_at_no_higher_loss():
    assert same_steps([example()])["case"].verdict == "pass"
    worse = example()
    worse.runs[-1].final_loss = 3.01
    assert same_steps([worse])["case"].verdict == "fail"


def test_a_diverged_arm_does_not_flatten_the_picture(monkeypatch, tmp_path):
    tops = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda self, path: tops.append(self.axes[0].get_ylim()[1]),
    )
    result = example()
    draw([result], tmp_path / "plain")
    result.runs.append(finished("lookahead", 1.0, 100, 100, 1e9))
    draw([result], tmp_path / "diverged")
    worst = max(r.final_loss for r in result.runs if r.arm == "base")
    assert worst < tops[-1] < 10 * worst
    assert worst < tops[0] < 10 * worst


@pytest.mark.parametrize("mode", ["schedule", "target"])
def test_plots_are_one_per_class(mode, tmp_path):
    pytest.importorskip("matplotlib")
    result = example()
    result.mode = mode
    for r in result.runs:
        r.points.insert(0, Point(0, 0.0, 0.0, 0.0, 4.0))
    empty = CaseResult("none", "controls", mode, 1.0, skipped="no data")
    (path,) = draw([result, empty], tmp_path / "all")
    assert path.name == "all_fine-tuning-conservative.svg"
    assert path.read_text().count("<path") > 5


def test_pairing_takes_the_seeds_that_both_have():
    result = example()
    for fraction in (0.5, 1, 2):
        other = finished("base", fraction, 1, round(100 * fraction), 9.0)
        other.seed = 1
        result.runs.append(other)
    figures = {(f.arm, f.fraction): f for f in arm_figures(result)}
    assert figures["hybrid", 1.0].cost_speedup.value == pytest.approx(100 / 15)
    assert figures["hybrid", 1.0].base_loss == 3.0
    assert figures["base", 1].seeds == 2


def test_shortened_schedule_is_the_base_at_the_same_cost():
    result = example()
    result.runs[-1] = finished("hybrid", 1.0, 100, 50, 2.9)
    (hybrid,) = [f for f in arm_figures(result) if f.arm == "hybrid"]
    assert hybrid.base_loss_same_cost == pytest.approx(3.5)


def test_ablation_is_compared_with_the_default_on_the_same_cases():
    result = example()
    result.runs.append(finished("hybrid:no-drift", 1.0, 100, 30, 3.0))
    quotient = against_default([result], "hybrid:no-drift", by_time=False)
    assert quotient["fine-tuning, conservative"].value == pytest.approx(0.5)


def test_document_puts_targets_first_and_hides_nothing():
    result = example()
    result.runs.append(finished("ema", 1.0, 100, 100, 3.0))
    result.missing = ["seeds 1: not run: everything"]
    absent = CaseResult("gone", "controls", "schedule", 1.0, skipped="no data here")
    meta = {
        "versions": {"python": "3"}, "command": "c", "commit": "abc", "date": "d",
        "scale": "quick", "seeds": [0], "hardware": "h", "threads": 1,
    }  # fmt: skip
    text = document(meta, [result, absent])
    assert "gone: skipped. no data here" in text
    assert "case: seeds 1: not run: everything" in text
    row = "| fine-tuning, conservative | 1/1 | 6x / 15x | yes | 6.67x | 1.00x |"
    assert row in text
    assert text.index(row) < text.index("### case")
