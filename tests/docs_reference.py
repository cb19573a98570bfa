"""Writes the configuration reference from the configuration's own source.

Type, default and range come from the structs, meanings from the docstring under each
field, units from the table here. ``HYBRIDOPT_WRITE_DOCS=1 pytest
tests/test_configuration_reference.py`` writes docs/configuration.md anew.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from hybridopt import config

PATH = Path(__file__).parent.parent / "docs" / "configuration.md"

STRUCTS: tuple[tuple[type[msgspec.Struct], str], ...] = (
    (config.HybridConfig, ""),
    (config.GainConfig, "gain"),
    (config.DriftConfig, "drift"),
    (config.LeadConfig, "lead"),
    (config.SecantConfig, "secant"),
    (config.RSSM, "predictor"),
    (config.MLP, "predictor"),
    (config.Linear, "predictor"),
    (config.Prior, "predictor"),
    (config.LinUCB, "bandit"),
    (config.FixedHorizon, "bandit"),
    (config.DivergenceConfig, "divergence"),
    (config.ResidualConfig, "residual"),
)
"""Every struct and the field of ``HybridConfig`` that holds it."""

UNITS = {
    "GainConfig.rate": "log gain per real step",
    "GainConfig.initial": "base steps",
    "GainConfig.minimum": "base steps",
    "GainConfig.maximum": "base steps",
    "GainConfig.lone_maximum": "base steps",
    "GainConfig.significance": "standard errors",
    "GainConfig.memory": "per real step",
    "GainConfig.relaxation": "per real step",
    "GainConfig.boost": "ratio",
    "GainConfig.eager": "base steps",
    "DriftConfig.beta": "per real step",
    "DriftConfig.window_steps": "real steps",
    "DriftConfig.rate": "log gain per window",
    "DriftConfig.initial": "windows of drift",
    "DriftConfig.minimum": "windows of drift",
    "DriftConfig.maximum": "windows of drift",
    "DriftConfig.memory_budget": "MiB",
    "DriftConfig.hold": "per window of drift",
    "LeadConfig.rate": "base steps per measurement",
    "LeadConfig.maximum": "base steps",
    "LeadConfig.relaxation": "per measurement",
    "LeadConfig.memory_budget": "MiB",
    "SecantConfig.pairs": "pairs",
    "SecantConfig.warmup_steps": "real steps",
    "SecantConfig.noise_threshold": "ratio",
    "SecantConfig.minimum_curvature": "ratio",
    "SecantConfig.shrink": "ratio",
    "SecantConfig.max_rejects": "rejections",
    "Linear.ridge": "mean squared feature",
    "Linear.memory": "per real step",
    "MLP.hidden_size": "units",
    "MLP.learning_rate": "Adam step size",
    "MLP.train_interval_steps": "real steps",
    "RSSM.hidden_size": "units",
    "RSSM.categoricals": "latents",
    "RSSM.classes": "classes",
    "RSSM.ensemble_size": "heads",
    "RSSM.unimix": "probability",
    "RSSM.free_nats": "nats",
    "RSSM.sequence_steps": "real steps",
    "RSSM.batch_size": "sequences",
    "RSSM.learning_rate": "Adam step size",
    "RSSM.train_interval_steps": "real steps",
    "LinUCB.exploration": "standard deviations",
    "LinUCB.ridge": "observations",
    "LinUCB.discount": "per update",
    "DivergenceConfig.loss_sigma_threshold": "standard deviations",
    "DivergenceConfig.gradient_norm_multiplier": "ratio",
    "DivergenceConfig.vanishing_gradient_threshold": "L2 norm",
    "DivergenceConfig.prediction_error_threshold": "standard deviations",
    "DivergenceConfig.oscillation_threshold": "share",
    "DivergenceConfig.check_interval_steps": "real steps",
    "DivergenceConfig.window_steps": "real steps",
    "DivergenceConfig.max_rollbacks": "rollbacks",
    "DivergenceConfig.rollback_window_steps": "calls to step",
    "DivergenceConfig.cooldown_steps": "real steps",
    "DivergenceConfig.pause_steps": "calls to step",
    "ResidualConfig.capacity": "residuals",
    "ResidualConfig.rank": "columns",
    "ResidualConfig.temperature": "ratio",
    "HybridConfig.warmup_steps": "real steps",
    "HybridConfig.full_steps": "real steps",
    "HybridConfig.max_predict_steps": "calls to step",
    "HybridConfig.confidence_threshold": "share",
    "HybridConfig.divergence_threshold": "ratio",
    "HybridConfig.validation_interval": "Predict phases",
    "HybridConfig.memory_budget": "MiB",
    "HybridConfig.clip_grad_norm": "L2 norm",
    "HybridConfig.seed": "seed",
}
"""Unit of every numeric field; a field that is missing here fails the test."""

HEAD = """\
# Configuration

Generated from `hybridopt/config.py`; a test fails when the two differ.

Nothing here needs changing for a normal run. Every value is checked however the
configuration is built (constructor, `replace`, `from_dict`, `from_file`); one outside
its range raises `ConfigError`, which names the field, the value and the rule.

```python
from hybridopt import HybridConfig, HybridPredictOptimizer
from hybridopt.config import DivergenceConfig, LinUCB

config = HybridConfig(max_predict_steps=8, bandit=LinUCB(exploration=0.2))
config = HybridConfig.preset("safe").replace(seed=1)
config = HybridConfig.from_file("hybrid.toml")
```

The same in a file, `.toml` or `.json`; `predictor` and `bandit` are tables whose `type`
says which of the structs below they are:

```toml
max_predict_steps = 8

[bandit]
type = "linucb"
exploration = 0.2

[divergence]
loss_sigma_threshold = 3.0
```
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD, _presets()]
    meanings = _meanings()
    for struct, holder in STRUCTS:
        parts.append(_section(struct, holder, meanings[struct.__name__]))
    return "\n".join(parts)


def fields() -> list[tuple[type[msgspec.Struct], str, Any]]:
    """Struct, name and annotated type of every field."""
    return [
        (struct, name, get_type_hints(struct, include_extras=True)[name])
        for struct, _ in STRUCTS
        for name in struct.__struct_fields__
    ]


def is_number(hint: Any) -> bool:
    """Whether a field holds a number, possibly None."""
    return bool({int, float} & set(_plain(hint)))


def _meanings() -> dict[str, dict[str, str]]:
    """The docstring under each field; under "" that of the struct itself."""
    tree = ast.parse(inspect.getsource(config))
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found.setdefault(node.name, {"": ast.get_docstring(node) or ""})
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _section(struct: type[msgspec.Struct], holder: str, texts: dict[str, str]) -> str:
    title = f"## {struct.__name__}" + (f" (`{holder}`)" if holder else "")
    lines = [title, "", _markdown(texts[""])]
    tag = struct.__struct_config__.tag
    if tag is not None:
        lines += ["", f'In files: `type = "{tag}"`.']
    hints = get_type_hints(struct, include_extras=True)
    if struct.__struct_fields__:
        lines += ["", "| field | type | default | range | unit | meaning |"]
        lines += ["|---|---|---|---|---|---|"]
    else:
        lines += ["", "No fields."]
    defaults = struct()
    for name in struct.__struct_fields__:
        cells = (
            f"`{name}`",
            _type(hints[name]),
            _default(getattr(defaults, name)),
            _range(hints[name]),
            UNITS.get(f"{struct.__name__}.{name}", "-"),
            _markdown(texts.get(name, "")).replace("|", "\\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _markdown(text: str) -> str:
    """Code marks of docstrings as those of Markdown."""
    return re.sub(r"``([^`]*)``", r"`\1`", text)


def _presets() -> str:
    lines = ["## Presets", "", "Differences from `balanced`, which is the default.", ""]
    lines += ["| preset | field | value |", "|---|---|---|"]
    default = config.HybridConfig().to_dict()
    for name in config.HybridConfig.PRESETS:
        values = config.HybridConfig.preset(name).to_dict()
        changed = [
            (key if sub is None else f"{key}.{sub}", value)
            for key, held in values.items()
            for sub, value, before in (
                ((k, v, default[key].get(k)) for k, v in held.items())
                if isinstance(held, dict)
                else ((None, held, default[key]),)
            )
            if value != before
        ]
        lines += [f"| `{name}` | `{k}` | {json.dumps(v)} |" for k, v in changed]
        if not changed:
            lines.append(f"| `{name}` | - | - |")
    return "\n".join([*lines, ""])


def _parts(hint: Any) -> list[Any]:
    """Members of a union, with None as ``NoneType``; else the type alone."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return list(get_args(hint))
    return [hint]


def _plain(hint: Any) -> list[Any]:
    """Members without their limits."""
    return [
        get_args(part)[0] if get_origin(part) is Annotated else part
        for part in _parts(hint)
    ]


def _type(hint: Any) -> str:
    names = []
    for part in _plain(hint):
        if get_origin(part) is typing.Literal:
            names.append("one of " + ", ".join(f"`{v!r}`" for v in get_args(part)))
        elif part is type(None):
            names.append("None")
        else:
            names.append(part.__name__)
    return " or ".join(names)


def _default(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return f"`{type(value).__name__}()`"
    return f"`{value!r}`"


def _range(hint: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    rules = [
        f"{sign} {getattr(meta, key):g}"
        for part in _parts(hint)
        if get_origin(part) is Annotated
        for meta in get_args(part)[1:]
        for key, sign in signs.items()
        if getattr(meta, key) is not None
    ]
    return ", ".join(rules) or "-"
