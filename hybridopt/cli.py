"""``hybridopt demo | report | bench``: the command line.

torch is imported by the command that needs it, so that ``--help`` answers at once.
Exit codes: 0 done, 1 a file or a benchmark failed, 2 wrong use (one line on stderr says
what and how to mend it), 130 interrupted.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hybridopt

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from hybridopt.errors import HybridError

    try:
        match options.command:
            case "demo":
                return _demo(options)
            case "report":
                return _report(options)
            case "bench":
                return _bench(rest)
    except HybridError as error:
        print(f"hybridopt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"hybridopt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hybridopt: interrupted", file=sys.stderr)
        return 130
    parser.print_help()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybridopt", description="Predicted steps for any PyTorch optimizer."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a byte-level GPT on real text, bare and wrapped, and compare",
        description="Trains a byte-level GPT on text that is already on this machine, "
        "with AdamW and with the same AdamW wrapped, and reports what that saved.",
    )
    demo.add_argument(
        "--preset",
        choices=("tiny", "small", "gpt2"),
        help="size (default: tiny on a CPU, small on a GPU; gpt2 needs a GPU)",
    )
    demo.add_argument(
        "--scenario",
        choices=("finetune", "pretrain"),
        default="finetune",
        help="continue from a checkpoint on other text, or train from scratch",
    )
    demo.add_argument("--text", metavar="PATH", help="file or directory to train on")
    demo.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    demo.add_argument(
        "--seeds", type=int, default=1, help="how many seeds to compare (default 1)"
    )
    demo.add_argument("--steps", type=int, help="scheduled steps of each run")
    demo.add_argument(
        "--checkpoint-steps", type=int, help="steps of the run before fine-tuning"
    )
    demo.add_argument(
        "--out",
        metavar="DIR",
        default="hybridopt-demo",
        help="where report and metrics go (default hybridopt-demo)",
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if any")
    demo.add_argument(
        "--plain", action="store_true", help="lines of text instead of a live table"
    )
    report = commands.add_parser("report", help="make an HTML report of a metrics file")
    report.add_argument("metrics", metavar="METRICS.jsonl")
    report.add_argument(
        "--out", metavar="FILE", help="default: METRICS.html beside the metrics file"
    )
    commands.add_parser(
        "bench", help="run the benchmarks of a checkout", add_help=False
    )
    return parser


def _version() -> str:
    return f"hybridopt {hybridopt.__version__}"


def _demo(options: argparse.Namespace) -> int:
    from hybridopt.demo.run import DemoOptions, run_demo

    run_demo(
        DemoOptions(
            preset=options.preset,
            scenario=options.scenario,
            text=options.text,
            seed=options.seed,
            seeds=options.seeds,
            steps=options.steps,
            checkpoint_steps=options.checkpoint_steps,
            out=options.out,
            device=options.device,
            interactive=False if options.plain else None,
        )
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from hybridopt.telemetry.comparison import Provenance
    from hybridopt.telemetry.metrics import read_metrics
    from hybridopt.telemetry.report import metrics_report, write_report

    source = Path(options.metrics)
    records = read_metrics(source)
    origin = Provenance(
        title=f"hybridopt: {source.name}",
        command=f"hybridopt report {source.name}",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions={"report made with": _version()},
        hardware="not recorded in a metrics file; the report was made on "
        f"{platform.machine()}",
    )
    target = Path(options.out) if options.out else source.with_suffix(".html")
    print(f"report: {write_report(target, metrics_report(records, origin))}")
    return 0


def _bench(rest: Sequence[str]) -> int:
    """Hand over to ``python -m benchmarks`` of the checkout in this directory."""
    from hybridopt.errors import ConfigError

    if not Path("benchmarks", "__main__.py").is_file():
        raise ConfigError(
            f"bench: no benchmarks/ with a __main__.py in {Path.cwd()}. The benchmarks "
            "are not part of the installed package: run this in a checkout or in the "
            "unpacked source distribution (pip download --no-binary :all: hybridopt)."
        )
    return subprocess.run([sys.executable, "-m", "benchmarks", *rest]).returncode


if __name__ == "__main__":
    sys.exit(main())
