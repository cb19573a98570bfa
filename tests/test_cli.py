import subprocess
import sys

import pytest

import hybridopt
from hybridopt.cli import main
from hybridopt.demo.presets import PRESETS
from hybridopt.telemetry import MetricsSink
from tests.demo.micro import MICRO
from tests.telemetry.builders import hybrid_records


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "run.jsonl"
    with MetricsSink(path) as sink:
        for record in hybrid_records():
            sink.write(record)
    return path


def test_cli_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hybridopt {hybridopt.__version__}\n"


def test_cli_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("demo", "report", "bench"))


def test_cli_without_a_command_shows_help_and_fails(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_cli_report_renders_a_metrics_file(metrics, capsys):
    assert main(["report", str(metrics)]) == 0
    target = metrics.with_suffix(".html")
    assert str(target) in capsys.readouterr().out
    page = target.read_text(encoding="utf-8")
    assert "<svg" in page
    assert "says nothing about speed" in page


def test_cli_report_writes_where_it_is_told(metrics, tmp_path):
    target = tmp_path / "deep" / "page.html"
    assert main(["report", str(metrics), "--out", str(target)]) == 0
    assert target.is_file()


def test_cli_report_of_a_missing_file_is_one_line_and_code_1(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.jsonl")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hybridopt: ")
    assert "none.jsonl" in error
    assert error.count("\n") == 1


def test_cli_report_of_a_broken_file_is_one_line_and_code_2(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"step": "x"}\n')
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert "line 1" in error
    assert error.count("\n") == 1


def test_cli_demo_errors_are_one_line_and_code_2(tmp_path, capsys):
    code = main(
        ["demo", "--device", "cpu", "--steps", "0", "--out", str(tmp_path / "o")]
    )
    assert code == 2
    error = capsys.readouterr().err
    assert "steps=0" in error
    assert error.count("\n") == 1


def test_cli_rejects_unknown_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--speed", "11"])
    assert stopped.value.code == 2
    assert "--speed" in capsys.readouterr().err


def test_cli_demo_passes_its_options_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PRESETS, "tiny", MICRO)
    text = tmp_path / "text.txt"
    text.write_bytes(b"one two three four five six seven eight nine ten\n" * 2000)
    out = tmp_path / "out"
    arguments = ["demo", "--scenario", "pretrain", "--text", str(text), "--plain"]
    arguments += ["--preset", "tiny", "--device", "cpu", "--steps", "3", "--seed", "5"]
    assert main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "scheduled steps" in said
    assert str(out / "report.html") in said
    assert (out / "metrics-seed5.jsonl").is_file()


def test_cli_bench_outside_a_checkout_says_where_to_get_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_cli_bench_hands_arguments_and_exit_code_over(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys; sys.exit(7 if sys.argv[1:] == ['--fast', 'x'] else 1)"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--fast", "x"]) == 7


def test_cli_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hybridopt.cli", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("hybridopt ")
    assert done.returncode == 0
