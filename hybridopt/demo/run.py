"""The demo from options to table and report.

Both runs of a seed start from the same weights and see the same batches; they advance
in turns of a twentieth of the schedule, so that a busy machine slows both alike.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import msgspec
import torch

import hybridopt
from hybridopt.demo.checkpoint import checkpoint
from hybridopt.demo.model import ByteGPT
from hybridopt.demo.presets import FINETUNE_RATE, SCENARIOS, Preset, preset
from hybridopt.demo.text import c_headers, standard_library, text_at
from hybridopt.demo.train import RunPlan, Task, TrainingRun, Weights
from hybridopt.errors import ConfigError
from hybridopt.telemetry.comparison import Comparison, Provenance
from hybridopt.telemetry.extras import require
from hybridopt.telemetry.live import Display, open_display
from hybridopt.telemetry.narrative import (
    describe,
    format_table,
    seed_rows,
    summary_rows,
)
from hybridopt.telemetry.report import comparison_report, write_report

__all__ = ["DemoOptions", "DemoResult", "run_demo"]

_EVALUATIONS = 20
"""Held-out evaluations per run, besides the one at the start."""
_RATE_NOTE = (
    f"The learning rate of {FINETUNE_RATE:g} is a conservative one on purpose: a bare "
    "optimizer whose rate was tuned for this text would close part of the gap. This "
    "demo does not measure how much."
)


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line asks for; None: decided by the machine or the preset."""

    preset: str | None = None
    scenario: str = "finetune"
    text: str | None = None
    """File or directory to fine-tune on (finetune) or to train on (pretrain)."""
    seed: int = 0
    seeds: int = 1
    """Repetitions with seeds ``seed``, ``seed + 1``, ..."""
    steps: int | None = None
    checkpoint_steps: int | None = None
    out: str = "hybridopt-demo"
    device: str | None = None
    interactive: bool | None = None
    """Live table (True) or plain lines (False); None asks the stream."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What was measured, and where the report is."""

    comparisons: tuple[Comparison, ...]
    report: Path


def run_demo(options: DemoOptions, stream: TextIO | None = None) -> DemoResult:
    """Train bare and hybrid, show progress on ``stream`` (stdout), write the report.

    Raises:
        HybridError: A package, the device or the text is missing, or an option is out
            of range; nothing was trained.
    """
    stream = stream or sys.stdout
    require("matplotlib", "the demo's report")
    device = _device(options.device)
    chosen = _preset(options, device)
    if options.scenario not in SCENARIOS:
        raise ConfigError(
            f"scenario={options.scenario!r}: use one of {', '.join(SCENARIOS)}."
        )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    display = open_display(stream, options.interactive)
    try:
        task, weights = _prepare(options, chosen, device, display)
        comparisons = tuple(
            _compare(replace(task, seed=seed), weights, display, out)
            for seed in range(options.seed, options.seed + options.seeds)
        )
    finally:
        display.close()
    origin = _provenance(options, task, chosen)
    page = comparison_report(comparisons, origin)
    report = write_report(out / "report.html", page)
    _write_numbers(out / "result.json", comparisons)
    _print_result(comparisons, origin, report, stream)
    return DemoResult(comparisons, report)


# -- before training -------------------------------------------------------------------


def _device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if available else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: must be cpu or cuda.")
    if name == "cuda" and not available:
        raise ConfigError(
            "device='cuda': torch sees no CUDA device. Use --device cpu, or install a "
            "CUDA build of torch."
        )
    return torch.device(name)


def _preset(options: DemoOptions, device: torch.device) -> Preset:
    """The preset with the options' steps."""
    name = options.preset or ("small" if device.type == "cuda" else "tiny")
    chosen = preset(name)
    if name == "gpt2" and device.type != "cuda":
        raise ConfigError(
            "preset='gpt2': 124 million parameters need a CUDA device. Use --preset "
            "tiny or small."
        )
    for field in ("steps", "checkpoint_steps", "seeds"):
        value = getattr(options, field)
        if value is not None and value < 1:
            raise ConfigError(f"{field}={value}: must be at least 1.")
    return msgspec.structs.replace(
        chosen,
        steps=options.steps or chosen.steps,
        checkpoint_steps=options.checkpoint_steps or chosen.checkpoint_steps,
    )


def _prepare(
    options: DemoOptions, chosen: Preset, device: torch.device, display: Display
) -> tuple[Task, Weights]:
    """The task of the compared runs, and the weights that they start from."""
    pretrain = options.scenario == "pretrain"
    warmup_share = chosen.warmup_steps / chosen.checkpoint_steps
    if pretrain:
        corpus = text_at(options.text) if options.text else standard_library()
        display.say(f"training from scratch on {corpus.name}")
        task = Task(
            chosen, corpus, options.seed, device, chosen.tuned_rate, warmup_share=0.1
        )
        return task, ByteGPT(chosen.model).initialize(options.seed).state_dict()
    target = text_at(options.text) if options.text else c_headers()
    source = Task(
        chosen, standard_library(), 0, device, chosen.tuned_rate, warmup_share
    )
    weights, _ = checkpoint(source, display)
    display.say(f"fine-tuning on {target.name} at a learning rate of {FINETUNE_RATE:g}")
    task = Task(chosen, target, options.seed, device, FINETUNE_RATE, warmup_share=0.0)
    return task, weights


# -- training --------------------------------------------------------------------------


def _compare(task: Task, weights: Weights, display: Display, out: Path) -> Comparison:
    """All runs of one seed."""
    steps = task.preset.steps
    bare_plan = RunPlan("bare", f"AdamW, {steps} scheduled steps", steps)
    hybrid_plan = RunPlan(
        "hybrid",
        f"the same AdamW in HybridPredictOptimizer with defaults, {steps} scheduled "
        "steps; its i-th gradient uses the bare run's i-th batch",
        steps,
        hybrid=True,
        metrics_path=out / f"metrics-seed{task.seed}.jsonl",
    )
    bare = TrainingRun(bare_plan, task, weights)
    hybrid = TrainingRun(hybrid_plan, task, weights)
    suffix = f" s{task.seed}" if task.seed else ""
    _train([bare, hybrid], display, suffix)
    finished = bare.finish(), hybrid.finish()
    # The honest rival of any method that spends less: the base itself, told to finish
    # within the same cost.
    short_steps = round(finished[1].cost)
    shortened = None
    if 1 <= short_steps < steps:
        rival_plan = RunPlan(
            "shortened",
            f"AdamW with its schedule shortened to the hybrid's cost, {short_steps} "
            "steps",
            short_steps,
        )
        rival = TrainingRun(rival_plan, task, weights)
        _train([rival], display, suffix)
        shortened = rival.finish()
    return Comparison(task.seed, *finished, shortened)


def _train(runs: list[TrainingRun], display: Display, suffix: str) -> None:
    """Advance the runs in turns until all are done, evaluating as they go."""
    shown = [(run, display.add(run.plan.name + suffix, run.steps)) for run in runs]
    for run, progress in shown:
        progress.validation_loss = run.evaluate()
    while not all(run.done for run, _ in shown):
        for run, progress in shown:
            run.advance(max(1, run.steps // _EVALUATIONS), progress, display.refresh)
            progress.validation_loss = run.evaluate()
            display.refresh(progress)


# -- after training --------------------------------------------------------------------


def _provenance(options: DemoOptions, task: Task, chosen: Preset) -> Provenance:
    corpus, model = task.corpus, chosen.model
    command = ["hybridopt", "demo", "--scenario", options.scenario]
    command += ["--preset", options.preset or ""] if options.preset else []
    command += ["--text", options.text] if options.text else []
    command += ["--seed", str(options.seed), "--seeds", str(options.seeds)]
    command += ["--steps", str(chosen.steps)]
    command += ["--checkpoint-steps", str(chosen.checkpoint_steps)]
    command += ["--device", task.device.type]
    parameters = sum(p.numel() for p in ByteGPT(model).parameters())
    return Provenance(
        title=f"hybridopt demo: {options.scenario} on {corpus.name}",
        command=shlex.join(command),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions={
            "hybridopt": hybridopt.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        hardware=_hardware(task.device),
        settings={
            "model": f"byte-level GPT, {parameters:,} parameters, {model.layers} "
            f"layers, width {model.width}, context {model.context}",
            "batch": f"{chosen.batch_size} sequences of {model.context} bytes",
            "learning rate": f"{task.learning_rate:g} (warm-up over "
            f"{task.warmup_share:.0%} of the steps, then linear decay)",
            "text": f"{corpus.name}, {len(corpus.train):,} bytes to train on "
            f"({corpus.train_files} files), {len(corpus.validation):,} held out "
            f"({corpus.validation_files or 'the end of the same file, no'} other "
            "files)",
            "text digest": corpus.digest,
            "seeds": ", ".join(
                str(seed) for seed in range(options.seed, options.seed + options.seeds)
            ),
        },
        notes=(_RATE_NOTE,) if options.scenario == "finetune" else (),
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return (
        f"{platform.machine()} CPU, {os.cpu_count()} cores visible, "
        f"{torch.get_num_threads()} torch threads"
    )


def _write_numbers(path: Path, comparisons: tuple[Comparison, ...]) -> None:
    """All evaluations and counts; step records are in the metrics files."""
    numbers = [
        {
            "seed": comparison.seed,
            "equal_loss": comparison.equal_loss(),
            "arms": [replace(arm, records=()) for arm in comparison.arms],
        }
        for comparison in comparisons
    ]
    path.write_bytes(
        msgspec.json.format(msgspec.json.encode(numbers), indent=1) + b"\n"
    )


def _print_result(
    comparisons: tuple[Comparison, ...],
    origin: Provenance,
    report: Path,
    stream: TextIO,
) -> None:
    lines = ["", *format_table(summary_rows(comparisons[0])), ""]
    if len(comparisons) > 1:
        lines += [*format_table(seed_rows(comparisons)), ""]
    lines += [*describe(comparisons), *origin.notes, "", f"report: {report}"]
    stream.write("\n".join(lines) + "\n")
    stream.flush()
