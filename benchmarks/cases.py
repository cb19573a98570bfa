"""Every benchmark case: its task, its rate, its class in the summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from benchmarks.arms import Setup
from benchmarks.schedules import Schedule
from benchmarks.tasks.base import Scale, Setting, TaskUnavailableError

__all__ = ["BUDGETS", "CASES", "Case", "Family", "select"]

BUDGETS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths of the bare base's runs, in the case's own scheduled steps."""

Family = Literal[
    "fine-tuning, 1e-5",
    "fine-tuning, conservative",
    "fine-tuning, 1e-4",
    "fine-tuning, 3e-4",
    "fine-tuning, 1e-3",
    "fine-tuning, tuned",
    "smooth, default rate",
    "smooth, tuned rate",
    "stochastic, rate 10x too low",
    "stochastic, tuned",
    "controls",
    "controls, scarce data",
    "any base, any rate",
    "other bases",
]
Maker = Callable[[Setting], Any]
Rates = dict[Scale, float]


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    family: Family
    make: Maker
    """Builds the task; imports its module only then."""
    rates: Rates
    """Learning rate per scale."""
    tuned: Rates
    """Best rate of the bare base at this case's length, per scale."""
    steps: dict[Scale, int]
    """N, scheduled steps of the case."""
    schedule: Schedule = "linear"
    base: Literal["adamw", "adam", "sgd", "rmsprop", "muon"] = "adamw"
    mode: Literal["schedule", "target"] = "schedule"
    """schedule: judged on the curve of base runs of several lengths; target: by the
    cost to reach the loss that the base has after N steps at a constant rate."""
    headline: float = 1.0
    """Length, in N, of the arms' run that the class mean uses. Fixed beforehand: a
    quarter where speedups of up to 16x must be measurable inside the base's 4 N."""
    scales: tuple[Scale, ...] = ("quick", "full", "gpu")
    step_ms: tuple[float, float, float] = (5.0, 20.0, 10.0)
    """About how long a bare step takes at quick, full (one core) and gpu; for the order
    of jobs and the time left only."""

    def step_s(self, scale: str) -> float:
        """Rough seconds of a bare step."""
        return self.step_ms[("quick", "full", "gpu").index(scale)] / 1000.0

    def setup(self, scale: Scale, fraction: float, *, tuned: bool = False) -> Setup:
        """What a run of ``fraction`` N steps is asked to do."""
        rate = (self.tuned if tuned else self.rates)[scale]
        steps = max(1, round(self.steps[scale] * fraction))
        return Setup(steps, rate, self.schedule, self.base)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Lengths at which arms other than the base run, in N."""
        return (self.headline, 1.0) if self.headline != 1.0 else (1.0,)


def _same(rate: float) -> Rates:
    return {"quick": rate, "full": rate, "gpu": rate}


def _scaled(rates: Rates, by: float) -> Rates:
    return {scale: rate * by for scale, rate in rates.items()}


def _finetune(setting: Setting, *, size: str | None = None) -> Any:
    from benchmarks.tasks import finetune_gpt

    return finetune_gpt.make(setting, size=size)


def _lora(setting: Setting) -> Any:
    from benchmarks.tasks import finetune_gpt

    return finetune_gpt.make_lora(setting)


def _pretrain(setting: Setting, *, size: str | None = None) -> Any:
    from benchmarks.tasks import pretrain_gpt

    return pretrain_gpt.make(setting, size=size)


def _module(setting: Setting, *, module: str, maker: str = "make") -> Any:
    from importlib import import_module

    return getattr(import_module(f"benchmarks.tasks.{module}"), maker)(setting)


def _smooth(setting: Setting, *, name: str) -> Any:
    from benchmarks.tasks import smooth

    if setting.device != "cpu":
        raise TaskUnavailableError(f"{name}: smooth problems run on the CPU only.")
    try:
        return smooth.make(name, setting.seed, setting.data)
    except ImportError as missing:
        raise TaskUnavailableError(
            f"{name}: {missing}. pip install scikit-learn pillow, for water coolprop."
        ) from None


_GPT_TUNED: Rates = {"quick": 3e-3, "full": 2e-3, "gpu": 1e-3}
_FINETUNE_TUNED: Rates = {"quick": 6e-3, "full": 2e-3, "gpu": 1e-3}
_FINETUNE_STEPS: dict[Scale, int] = {"quick": 400, "full": 400, "gpu": 400}
_MINILM_LORA_TUNED: Rates = {"quick": 5e-3, "full": 3e-3, "gpu": 2e-3}
_LORA_TUNED: Rates = {"quick": 2e-2, "full": 1e-2, "gpu": 3e-3}
_MINILM_STEPS: dict[Scale, int] = {"quick": 48, "full": 200, "gpu": 400}
_GPT_MS = (14.0, 90.0, 15.0)
_MINILM_MS = (330.0, 900.0, 20.0)
Rated = tuple[str, Family, float | None, float]
_RATED: tuple[Rated, ...] = (
    ("3e-5", "fine-tuning, conservative", 3e-5, 0.25),
    ("1e-4", "fine-tuning, 1e-4", 1e-4, 0.25),
    ("3e-4", "fine-tuning, 3e-4", 3e-4, 0.5),
    ("tuned", "fine-tuning, tuned", None, 1.0),
)
_SWEPT: tuple[Rated, ...] = (
    ("1e-5", "fine-tuning, 1e-5", 1e-5, 0.25),
    ("1e-3", "fine-tuning, 1e-3", 1e-3, 1.0),
)
"""The ends of the sweep over rates; between them are the classes with targets."""


def _finetuning() -> list[Case]:
    def rated(
        name: str,
        make: Maker,
        tuned: Rates,
        steps: dict[Scale, int],
        labels: tuple[Rated, ...] = _RATED,
        **more: Any,
    ) -> list[Case]:
        return [
            Case(
                f"{name}-{label}",
                family,
                make,
                tuned if rate is None else _same(rate),
                tuned,
                steps,
                headline=headline,
                **more,
            )
            for label, family, rate, headline in labels
        ]

    minilm = partial(_module, module="minilm")
    adapters = partial(_module, module="minilm", maker="make_lora")
    big = partial(_finetune, size="124m")
    gpt: dict[str, Any] = {"step_ms": _GPT_MS}
    lm: dict[str, Any] = {"step_ms": _MINILM_MS}
    lora: dict[str, Any] = {"step_ms": (150.0, 500.0, 20.0)}
    large: dict[str, Any] = {"step_ms": (0.0, 0.0, 40.0), "scales": ("gpu",)}
    return [
        *rated("finetune", _finetune, _FINETUNE_TUNED, _FINETUNE_STEPS, **gpt),
        *rated("finetune", _finetune, _FINETUNE_TUNED, _FINETUNE_STEPS, _SWEPT, **gpt),
        *rated("lora", _lora, _LORA_TUNED, _FINETUNE_STEPS, **gpt),
        *rated("minilm", minilm, _same(2e-4), _MINILM_STEPS, **lm),
        *rated("minilm-lora", adapters, _MINILM_LORA_TUNED, _MINILM_STEPS, **lora),
        *rated("finetune-124m", big, _same(3e-4), _FINETUNE_STEPS, **large),
    ]


_SMOOTH_TUNED = {
    "poisson": 1e-2,
    "heat": 1e-2,
    "siren": 3e-3,
    "mlp_full": 1e-2,
    "logreg_full": 1e-1,
    "ae_full": 1e-2,
    "water": 1e-2,
}


def _smooth_cases() -> list[Case]:
    cases = []
    for name, rate in _SMOOTH_TUNED.items():
        default = Case(
            f"smooth-{name}-default",
            "smooth, default rate",
            partial(_smooth, name=name),
            _same(1e-3),
            _same(rate),
            {"quick": 4000, "full": 4000, "gpu": 4000},
            schedule="constant",
            base="adam",
            mode="target",
            scales=("quick", "full"),
            step_ms=(1.0, 1.0, 0.0),
        )
        tuned = replace(
            default,
            name=f"smooth-{name}-tuned",
            family="smooth, tuned rate",
            rates=_same(rate),
        )
        cases += [default, tuned]
    return cases


def _stochastic() -> list[Case]:
    gpt: dict[Scale, int] = {"quick": 400, "full": 800, "gpu": 800}
    conv: dict[Scale, int] = {"quick": 300, "full": 1000, "gpu": 1500}
    table: dict[Scale, int] = {"quick": 500, "full": 1500, "gpu": 1500}
    convnet = partial(_module, module="convnet")
    tabular = partial(_module, module="tabular")
    big = partial(_pretrain, size="124m")
    family: Family = "stochastic, tuned"
    rates = _GPT_TUNED
    text: dict[str, Any] = {"step_ms": _GPT_MS}
    tuned = [
        Case("pretrain-wsd", family, _pretrain, rates, rates, gpt, "wsd", **text),
        Case("pretrain-cosine", family, _pretrain, rates, rates, gpt, "cosine", **text),
        Case(
            "convnet", family, convnet, _same(1e-1), _same(1e-1), conv, "cosine",
            step_ms=(12.0, 30.0, 4.0),
        ),
        Case(
            "tabular", family, tabular, _same(1e-2), _same(1e-2), table, "cosine",
            step_ms=(8.0, 8.0, 3.0),
        ),
        Case(
            "pretrain-124m", family, big, _same(6e-4), _same(6e-4), gpt, "wsd",
            scales=("gpu",), step_ms=(0.0, 0.0, 40.0),
        ),
    ]  # fmt: skip
    low = [
        replace(
            case,
            name=f"{case.name}-low",
            family="stochastic, rate 10x too low",
            rates=_scaled(case.tuned, 0.1),
        )
        for case in tuned
    ]
    muon: Rates = {"quick": 1e-2, "full": 5e-3, "gpu": 3e-3}
    other = Case(
        "pretrain-muon", "other bases", _pretrain, muon, muon, gpt, "wsd", "muon",
        step_ms=(16.0, 100.0, 20.0),
    )  # fmt: skip
    swept = [
        Case(
            f"{task}-{base}-{rate:g}", "any base, any rate", make, _same(rate),
            _same(rate), steps, "cosine", base, step_ms=(ms, ms, 4.0),
        )
        for task, make, steps, ms, base, rate in (
            ("convnet", convnet, conv, 12.0, "sgd", 3e-2),
            ("convnet", convnet, conv, 12.0, "sgd", 3e-1),
            ("convnet", convnet, conv, 12.0, "rmsprop", 3e-3),
            ("convnet", convnet, conv, 12.0, "adam", 3e-2),
            ("tabular", tabular, table, 8.0, "sgd", 1e-1),
            ("tabular", tabular, table, 8.0, "adam", 3e-2),
        )
    ]  # fmt: skip
    return [*tuned, *low, other, *swept]  # type: ignore[list-item]


def _controls() -> list[Case]:
    steps: dict[Scale, int] = {"quick": 1000, "full": 2000, "gpu": 2000}

    def control(
        name: str,
        rate: float,
        schedule: Schedule,
        family: Family = "controls",
        step_ms: tuple[float, float, float] = (10.0, 20.0, 4.0),
    ) -> Case:
        make = partial(_module, module="controls", maker=f"make_{name}")
        return Case(
            f"control-{name.replace('_', '-')}",
            family,
            make,
            _same(rate),
            _same(rate),
            steps,
            schedule,
            "adam",
            step_ms=step_ms,
        )

    scarce: Family = "controls, scarce data"
    small = (0.4, 0.4, 2.0)
    return [
        control("tiny_batch", 3e-3, "linear"),
        control("label_noise", 1e-3, "linear"),
        control("jump", 1e-3, "constant"),
        control("minimax", 1e-2, "linear"),
        control("tiny_batch_digits", 1e-2, "linear", scarce, small),
        control("label_noise_digits", 3e-3, "linear", scarce, small),
        control("jump_digits", 3e-3, "constant", scarce, small),
    ]


CASES = {
    case.name: case
    for case in (*_finetuning(), *_smooth_cases(), *_stochastic(), *_controls())
}


def select(patterns: list[str], scale: Scale) -> list[Case]:
    """Cases of a scale whose name or family contains one of the patterns.

    Raises:
        ValueError: A pattern that matches nothing.
    """
    known = [case for case in CASES.values() if scale in case.scales]
    if not patterns:
        return known
    for pattern in patterns:
        if not any(pattern in c.name or pattern in c.family for c in known):
            names = ", ".join(c.name for c in known)
            raise ValueError(f"case {pattern!r}: matches nothing. Cases: {names}.")
    exact = [c for c in known if c.name in patterns]
    partial_patterns = [p for p in patterns if p not in CASES]
    return exact + [
        c
        for c in known
        if c not in exact
        and any(p in c.name or p in c.family for p in partial_patterns)
    ]
