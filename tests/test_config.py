from __future__ import annotations

import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridopt import config as module
from hybridopt.config import (
    MLP,
    RSSM,
    DivergenceConfig,
    DriftConfig,
    FixedHorizon,
    GainConfig,
    HybridConfig,
    LeadConfig,
    Linear,
    LinUCB,
    Prior,
    ResidualConfig,
    SecantConfig,
)
from hybridopt.errors import ConfigError, HybridError, RecoveryAction

STRUCTS: tuple[type[msgspec.Struct], ...] = tuple(
    getattr(module, name) for name in module.__all__
)
HOLDER = {
    GainConfig: "gain",
    DriftConfig: "drift",
    LeadConfig: "lead",
    SecantConfig: "secant",
    RSSM: "predictor",
    MLP: "predictor",
    Linear: "predictor",
    Prior: "predictor",
    LinUCB: "bandit",
    FixedHorizon: "bandit",
    DivergenceConfig: "divergence",
    ResidualConfig: "residual",
}


# -- what is forbidden, read off the declarations --------------------------------------


def members(hint: Any) -> list[Any]:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return list(get_args(hint))
    return [hint]


def wrong_values(hint: Any) -> list[Any]:
    """Values just outside the declared limits, and values of another type."""
    wrong: list[Any] = [[], {"surely": "not a value"}]
    kinds = set()
    for part in members(hint):
        kind = get_args(part)[0] if get_origin(part) is Annotated else part
        kinds.add(kind)
        for meta in get_args(part)[1:] if get_origin(part) is Annotated else ():
            step = 1 if kind is int else 1e-9
            if meta.ge is not None:
                wrong.append(kind(meta.ge) - step)
            if meta.gt is not None:
                wrong.append(kind(meta.gt))
            if meta.le is not None:
                wrong.append(kind(meta.le) + step)
            if meta.lt is not None:
                wrong.append(kind(meta.lt))
    if str not in kinds:
        wrong.append("seven")
    if kinds & {int, bool} and float not in kinds:
        wrong.append(1.5)
    if type(None) not in kinds:
        wrong.append(None)
    return wrong


CASES = [
    pytest.param(struct, name, value, id=f"{struct.__name__}.{name}={value!r}")
    for struct in STRUCTS
    for name, hint in get_type_hints(struct, include_extras=True).items()
    if name in struct.__struct_fields__
    for value in wrong_values(hint)
]


def inside(struct: type[msgspec.Struct], name: str, value: Any) -> dict[str, Any]:
    """Plain values of a whole configuration with one field set."""
    if struct is HybridConfig:
        return {name: value}
    table = {name: value}
    if struct.__struct_config__.tag is not None:
        table["type"] = struct.__struct_config__.tag
    return {HOLDER[struct]: table}


@pytest.mark.parametrize(("struct", "name", "value"), CASES)
def test_config_refuses_wrong_values_on_every_path(
    struct: type[msgspec.Struct], name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"{struct.__name__}\.{name}="):
        struct(**{name: value})
    with pytest.raises(ConfigError, match=rf"{struct.__name__}\.{name}="):
        msgspec.structs.replace(struct(), **{name: value})
    with pytest.raises(ConfigError, match=name):
        HybridConfig.from_dict(inside(struct, name, value))
    if struct is HybridConfig:
        with pytest.raises(ConfigError, match=rf"HybridConfig\.{name}="):
            HybridConfig().replace(**{name: value})


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_config_refuses_wrong_values_in_files(tmp_path: Path, value: float) -> None:
    for suffix, text in (
        (".toml", f"[gain]\nrate = {value}\n"),
        (".json", json.dumps({"gain": {"rate": value}})),
    ):
        path = tmp_path / f"bad{suffix}"
        path.write_text(text)
        with pytest.raises(ConfigError, match="rate"):
            HybridConfig.from_file(path)


def test_config_cases_cover_every_field() -> None:
    covered = {(case.values[0], case.values[1]) for case in CASES}
    assert covered == {(s, f) for s in STRUCTS for f in s.__struct_fields__}


@pytest.mark.parametrize(
    ("struct", "name"),
    [
        (struct, name)
        for struct in STRUCTS
        for name, hint in get_type_hints(struct, include_extras=True).items()
        if name in struct.__struct_fields__ and "float" in str(hint)
    ],
)
def test_config_refuses_nan_everywhere(struct: type[msgspec.Struct], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        struct(**{name: math.nan})


# -- messages --------------------------------------------------------------------------


def test_config_message_has_field_value_rule_and_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        HybridConfig(warmup_steps=-3)
    message = str(caught.value)
    assert message.startswith("HybridConfig.warmup_steps=-3: ")
    assert ">= 0" in message
    assert "docs/configuration.md" in message
    assert caught.value.recovery is RecoveryAction.FIX_CONFIGURATION
    assert isinstance(caught.value, HybridError)
    assert isinstance(caught.value, ValueError)


def test_config_message_of_a_file_names_the_path_to_the_field() -> None:
    with pytest.raises(ConfigError) as caught:
        HybridConfig.from_dict({"divergence": {"loss_sigma_threshold": 0}})
    message = str(caught.value)
    assert "divergence" in message
    assert "loss_sigma_threshold" in message
    assert "> 0" in message
    assert "docs/configuration.md" in message


def test_config_refuses_a_smallest_gain_above_the_largest() -> None:
    gain = GainConfig(minimum=3.0, maximum=2.0)
    for build in (
        lambda: HybridConfig(gain=gain),
        lambda: HybridConfig().replace(gain=gain),
        lambda: HybridConfig.from_dict({"gain": {"minimum": 3.0, "maximum": 2.0}}),
    ):
        with pytest.raises(ConfigError, match=r"(?s)minimum=3\.0.*maximum=2\.0.*Lower"):
            build()


# -- unknown names ---------------------------------------------------------------------


def test_config_refuses_unknown_keys_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup"):
        HybridConfig.from_dict({"warmup": 3})
    with pytest.raises(ConfigError, match="speed"):
        HybridConfig.from_dict({"gain": {"speed": 3.0}})
    with pytest.raises(ConfigError, match=r"HybridConfig\.warmup: no such field.*seed"):
        HybridConfig().replace(warmup=3)
    path = tmp_path / "c.toml"
    path.write_text("[residual]\nranks = 2\n")
    with pytest.raises(ConfigError, match="ranks"):
        HybridConfig.from_file(path)


@pytest.mark.parametrize("field", ["predictor", "bandit"])
def test_config_refuses_unknown_and_missing_kinds(field: str) -> None:
    for table in ({"type": "oracle"}, {"hidden_size": 3}, {}):
        with pytest.raises(ConfigError, match=field):
            HybridConfig.from_dict({field: table})


def test_config_refuses_a_field_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="ridge"):
        HybridConfig.from_dict({"predictor": {"type": "mlp", "ridge": 1.0}})


# -- presets ---------------------------------------------------------------------------


def test_config_presets_differ_and_balanced_is_the_default() -> None:
    built = [HybridConfig.preset(name) for name in HybridConfig.PRESETS]
    assert HybridConfig.preset("balanced") == HybridConfig()
    assert len({msgspec.json.encode(c) for c in built}) == len(built) == 3


def test_config_presets_are_ordered_by_boldness() -> None:
    safe, balanced, aggressive = (
        HybridConfig.preset(n) for n in ("safe", "balanced", "aggressive")
    )
    steps = [c.max_predict_steps for c in (safe, balanced, aggressive)]
    warmups = [c.warmup_steps for c in (safe, balanced, aggressive)]
    bars = [c.confidence_threshold for c in (safe, balanced, aggressive)]
    assert steps == sorted(steps)
    assert warmups == sorted(warmups, reverse=True)
    assert bars == sorted(bars, reverse=True)


def test_config_unknown_preset_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'fast'.*safe, balanced, aggressive"):
        HybridConfig.preset("fast")


# -- values ----------------------------------------------------------------------------


def test_config_is_frozen() -> None:
    frozen = HybridConfig()
    with pytest.raises(AttributeError):
        frozen.seed = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        frozen.gain.rate = 3.0  # type: ignore[misc]


def test_config_replace_changes_a_copy() -> None:
    one = HybridConfig()
    other = one.replace(seed=5, bandit=FixedHorizon())
    assert (one.seed, other.seed) == (0, 5)
    assert other.bandit == FixedHorizon()
    assert other.replace(seed=0, bandit=LinUCB()) == one


def test_config_takes_integers_for_floats_and_stays_equal() -> None:
    one, other = HybridConfig(memory_budget=8), HybridConfig(memory_budget=8.0)
    assert isinstance(one.memory_budget, float)
    assert msgspec.json.encode(one) == msgspec.json.encode(other)


def test_config_takes_the_limits_themselves() -> None:
    for kind, limits in (
        (
            HybridConfig,
            {"warmup_steps": 0, "confidence_threshold": 1.0, "memory_budget": 0.0},
        ),
        (LinUCB, {"discount": 1.0, "exploration": 0.0}),
        (
            DivergenceConfig,
            {"window_steps": 4, "cooldown_steps": 0, "oscillation_threshold": 0.0},
        ),
        (ResidualConfig, {"rank": 0, "capacity": 1}),
    ):
        made = kind(**limits)
        assert {name: getattr(made, name) for name in limits} == limits


# -- files -----------------------------------------------------------------------------


def numbers(hint: Any) -> st.SearchStrategy[Any]:
    """Valid values of one field, from its declaration."""
    options = []
    for part in members(hint):
        kind = get_args(part)[0] if get_origin(part) is Annotated else part
        low, high, open_low, open_high = None, None, False, False
        for meta in get_args(part)[1:] if get_origin(part) is Annotated else ():
            low = meta.gt if meta.gt is not None else meta.ge
            high = meta.lt if meta.lt is not None else meta.le
            open_low, open_high = meta.gt is not None, meta.lt is not None
        if kind is bool:
            options.append(st.booleans())
        elif kind is int:
            options.append(st.integers(int(low or 0), int(high or 10**9)))
        elif kind is float:
            options.append(
                st.floats(
                    low,
                    high if high is not None else 1e12,
                    exclude_min=open_low,
                    exclude_max=open_high,
                )
            )
        elif kind is str:
            # Paths: printable, and in the plane that JSON and TOML escape alike.
            printable = st.characters(
                max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]
            )
            options.append(st.text(printable, max_size=9))
        elif kind is type(None):
            options.append(st.none())
        elif get_origin(kind) is typing.Literal:
            options.append(st.sampled_from(get_args(kind)))
        else:
            options.append(structs(kind))
    return st.one_of(options)


def structs(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(struct, include_extras=True)
    fields = {name: numbers(hints[name]) for name in struct.__struct_fields__}
    if struct is GainConfig:
        fields["minimum"] = st.floats(0, 1e-3)
        fields["maximum"] = st.floats(1e-3, 1e6)
    return st.fixed_dictionaries({}, optional=fields).map(lambda v: struct(**v))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(structs(HybridConfig))
def test_config_files_give_back_what_was_written(
    tmp_path: Path, config: HybridConfig
) -> None:
    assert HybridConfig.from_dict(config.to_dict()) == config
    for suffix in (".toml", ".json"):
        path = tmp_path / f"c{suffix}"
        config.to_file(path)
        assert HybridConfig.from_file(str(path)) == config


@pytest.mark.parametrize("name", HybridConfig.PRESETS)
def test_config_presets_survive_files(tmp_path: Path, name: str) -> None:
    preset = HybridConfig.preset(name)
    for suffix in (".toml", ".json"):
        preset.to_file(tmp_path / f"p{suffix}")
        assert HybridConfig.from_file(tmp_path / f"p{suffix}") == preset


def test_config_files_of_a_few_lines_leave_the_rest_at_default(tmp_path: Path) -> None:
    path = tmp_path / "few.toml"
    path.write_text('seed = 4\n[predictor]\ntype = "mlp"\nhidden_size = 8\n')
    expected = HybridConfig(seed=4, predictor=MLP(hidden_size=8))
    assert HybridConfig.from_file(path) == expected
    path.write_text("")
    assert HybridConfig.from_file(path) == HybridConfig()


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "seed = = 1"), ("a.json", '{"seed": 1')]
)
def test_config_files_with_broken_syntax_are_refused(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*Mend the syntax"):
        HybridConfig.from_file(path)


def test_config_files_of_another_suffix_are_refused_and_not_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(
        ConfigError, match=r"'\.yaml' is unknown\. Use \.toml or \.json"
    ):
        HybridConfig().to_file(path)
    assert not path.exists()
    path.write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"Use \.toml or \.json"):
        HybridConfig.from_file(path)


def test_config_files_that_are_missing_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HybridConfig.from_file(tmp_path / "none.toml")
