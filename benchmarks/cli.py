"""The command ``python -m benchmarks`` (also ``hybridopt bench``).

Without an action it runs the cases, without names all of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.arms import ABLATIONS, ARMS, PEERS
from benchmarks.cases import BUDGETS, CASES, Case, select
from benchmarks.collecting import Collected, joined
from benchmarks.plots import draw
from benchmarks.pool import Interrupted, interruptible, run_jobs
from benchmarks.progress import Progress, ordered, shown
from benchmarks.provenance import command_line, provenance
from benchmarks.resuming import resumed, waiting
from benchmarks.store import load, save
from benchmarks.suite import CaseResult, Options, runs_of
from benchmarks.tables import document
from benchmarks.tasks.base import TaskUnavailableError

__all__ = ["main"]

_ACTIONS = ("run", "list", "report", "tune", "overhead", "fetch")
_RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one action of the command line and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["overhead"]:
        # Its options are its own; argparse cannot hand over words that begin with one.
        return _overhead(words[1:])
    if words[:1] == ["fetch"]:
        return _fetch(words[1:])
    if not words or words[0] not in (*_ACTIONS, "-h", "--help"):
        words.insert(0, "run")
    parser = _parser()
    options = parser.parse_args(words)
    try:
        status: int = options.action(options)
    except (ValueError, FileNotFoundError) as wrong:
        parser.exit(2, f"benchmarks: {wrong}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    running = actions.add_parser("run", help="run cases and write their results")
    running.add_argument("cases", nargs="*", help="parts of case or class names")
    _common(running)
    running.add_argument(
        "--arms",
        default="base,hybrid,peers",
        help="comma-separated names; 'peers' and 'ablations' stand for all of them, "
        "'all' for everything",
    )
    running.add_argument(
        "--jobs", type=int, default=1, help="seeds of cases at once, each a process"
    )
    running.add_argument(
        "--minutes",
        type=float,
        help="start nothing later; say what is missing",
    )
    running.add_argument(
        "--resume",
        type=Path,
        help="JSON of a run that was cut: go on in that file with the same arguments",
    )
    running.add_argument("--out", type=Path, default=_RESULTS, help="results folder")
    running.add_argument("--no-plots", action="store_true", help="tables only")
    running.add_argument("--name", help="file name instead of the case's")
    running.set_defaults(action=_run)

    listing = actions.add_parser("list", help="list cases and arms")
    listing.set_defaults(action=_list)

    reporting = actions.add_parser("report", help="one table from result files")
    reporting.add_argument("files", nargs="+", type=Path, help="JSON results")
    reporting.add_argument("--out", type=Path, help="Markdown file; else printed")
    reporting.set_defaults(action=_report)

    tuning = actions.add_parser("tune", help="final loss of the bare base over rates")
    tuning.add_argument("cases", nargs="+", help="parts of case or class names")
    tuning.add_argument("--rates", required=True, help="comma-separated rates")
    _common(tuning)
    tuning.set_defaults(action=_tune)

    actions.add_parser("overhead", help="whole-wrapper overhead per step")
    actions.add_parser("fetch", help="get the real data sets into a folder")
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=("quick", "full", "gpu"), default="quick")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", help="cuda at scale gpu, else cpu, unless given")
    parser.add_argument("--data", type=Path, help="folder with further data sets")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--budgets", help="lengths of the base's runs in N, comma-separated"
    )
    parser.add_argument(
        "--step-scale",
        type=float,
        default=1.0,
        help="factor on all steps (smoke tests)",
    )


def _options(parsed: argparse.Namespace) -> Options:
    torch.set_num_threads(parsed.threads)
    if getattr(parsed, "jobs", 1) < 1:
        raise ValueError(f"--jobs {parsed.jobs}: must be >= 1. Use 1 for no workers.")
    device = parsed.device or ("cuda" if parsed.scale == "gpu" else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device here. Use --device cpu.")
    budgets = BUDGETS
    if parsed.budgets:
        budgets = tuple(float(b) for b in parsed.budgets.split(","))
    return Options(
        scale=parsed.scale,
        seeds=tuple(range(parsed.first_seed, parsed.first_seed + parsed.seeds)),
        arms=_arms(getattr(parsed, "arms", "base")),
        device=device,
        data=parsed.data,
        budgets=budgets,
        step_scale=parsed.step_scale,
        threads=parsed.threads,
    )


def _arms(text: str) -> tuple[str, ...]:
    names: list[str] = []
    for word in text.split(","):
        match word.strip():
            case "all":
                names += list(ARMS)
            case "peers":
                names += [arm.name for arm in PEERS]
            case "ablations":
                names += [arm.name for arm in ABLATIONS]
            case name if name in ARMS:
                names.append(name)
            case name:
                known = ", ".join(("all", "peers", "ablations", *ARMS))
                raise ValueError(f"--arms {name!r}: unknown. Use some of {known}.")
    return tuple(dict.fromkeys(names))


def _run(parsed: argparse.Namespace) -> int:
    """Run the cases; results are written as they come and when interrupted."""
    options = _options(parsed)
    cases = select(parsed.cases, parsed.scale)
    meta = provenance(command_line(), options, jobs=parsed.jobs)
    parsed.out.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", meta["hardware"].lower()).strip("-")[:24]
    title = parsed.name or (cases[0].name if len(cases) == 1 else "all")
    stem = parsed.out / f"{title}_{device}_{meta['date']}"
    kept: list[CaseResult] = []
    if parsed.resume:
        stem = parsed.resume.parent / parsed.resume.name.removesuffix(".json")
        meta, kept = resumed(parsed.resume, meta, cases, options)
    collected = Collected(cases, options, lambda rs: save(_json(stem), meta, rs), kept)
    jobs = waiting(ordered([case.name for case in cases], options), kept)
    events = run_jobs(jobs, options, parsed.jobs, minutes=parsed.minutes)
    interrupted = ""
    try:
        with interruptible(), shown(Progress(jobs, options)) as show:
            for event in events:
                show(event)
                collected.take(event)
    except Interrupted as stopped:
        interrupted = str(stopped)
    finally:
        events.close()
        results = collected.finish()
    meta["interrupted"] = interrupted
    save(_json(stem), meta, results)
    text = document(meta, results)
    Path(f"{stem}.md").write_text(text, "utf-8")
    pictures = [] if parsed.no_plots or interrupted else draw(results, stem)
    print(text)
    print(f"written: {stem}.json, .md and {len(pictures)} plots")
    if interrupted:
        print(f"interrupted by {interrupted}: the table holds what was done until then")
        return 130
    failed = [r for result in results for r in result.runs if r.failure]
    broken = any(result.errors for result in results)
    return 1 if broken or any(r.arm.startswith("hybrid") for r in failed) else 0


def _json(stem: Path) -> Path:
    # with_suffix would cut a name at its last dot.
    return Path(f"{stem}.json")


def _list(_: argparse.Namespace) -> int:
    for case in CASES.values():
        rates = "/".join(f"{case.rates[s]:g}" for s in case.scales)
        print(f"{case.name:28s} {case.family:30s} lr {rates:18s} {case.schedule}")
    print("arms: " + ", ".join(ARMS))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    """Merge result files into one table, and plots where a file is written.

    A case that is in several files (other seeds, other arms) becomes one.
    """
    loaded = [load(path) for path in parsed.files]
    results = joined([results for _, results in loaded])
    meta = dict(loaded[0][0])
    if len(loaded) > 1:
        for key in ("command", "commit", "scale", "hardware", "jobs", "threads"):
            meta[key] = "; ".join(dict.fromkeys(str(m[key]) for m, _ in loaded))
        meta["seeds"] = sorted({seed for m, _ in loaded for seed in m["seeds"]})
    text = document(meta, results)
    if parsed.out:
        parsed.out.write_text(text, "utf-8")
        draw(results, parsed.out.with_suffix(""))
    else:
        print(text)
    return 0


def _tune(parsed: argparse.Namespace) -> int:
    """Print the bare base's loss at N steps for each rate."""
    options = _options(parsed)
    for case in select(parsed.cases, parsed.scale):
        for rate in (float(r) for r in parsed.rates.split(",")):
            losses = _losses(case, rate, options)
            mean = sum(losses) / len(losses) if losses else float("nan")
            spread = " ".join(f"{loss:.5g}" for loss in losses)
            print(
                f"{case.name:28s} lr {rate:8g}  {mean:10.6g}   ({spread})", flush=True
            )
    return 0


def _losses(case: Case, rate: float, options: Options) -> list[float]:
    rates = {scale: rate for scale in case.rates}
    tried = replace(case, rates=rates, tuned=rates)
    alone = replace(options, arms=("base",), budgets=(1.0,))
    found: list[float] = []
    try:
        for seed in options.seeds:
            found += [r.final_loss for r in runs_of(tried, alone, seed)]
    except TaskUnavailableError as missing:
        print(f"skipped: {missing}", file=sys.stderr)
    return found


def _overhead(words: Sequence[str]) -> int:
    # Imported here: it needs none of the cases, and they need nothing of it.
    from benchmarks import overhead

    return overhead.main(words)


def _fetch(words: Sequence[str]) -> int:
    from benchmarks import fetch

    return fetch.main(words)
