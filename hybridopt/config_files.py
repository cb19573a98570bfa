"""A configuration's plain values in ``.toml`` and ``.json`` files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from hybridopt.errors import ConfigError

__all__ = ["read_values", "write_values"]


def read_values(path: Path) -> dict[str, Any]:
    """The file's values; the suffix says how they are written.

    Raises:
        ConfigError: Unknown suffix or broken syntax.
        OSError: The file cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        match path.suffix:
            case ".toml":
                values = tomllib.loads(text)
            case ".json":
                values = json.loads(text)
            case suffix:
                raise _unknown_suffix(path, suffix)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}. Mend the syntax.") from None
    return values


def write_values(path: Path, values: dict[str, Any]) -> None:
    """Write a file that ``read_values`` reads back equal, less the None in TOML.

    Raises:
        ConfigError: Unknown suffix; nothing is written.
    """
    match path.suffix:
        case ".toml":
            text = _toml(values)
        case ".json":
            text = json.dumps(values, indent=2) + "\n"
        case suffix:
            raise _unknown_suffix(path, suffix)
    path.write_text(text, encoding="utf-8")


def _unknown_suffix(path: Path, suffix: str) -> ConfigError:
    return ConfigError(
        f"config file {path}: suffix {suffix!r} is unknown. Use .toml or .json."
    )


def _toml(values: dict[str, Any]) -> str:
    """One table per nested struct; the configuration nests one level deep."""
    lines = [
        f"{key} = {_scalar(value)}"
        for key, value in values.items()
        if not isinstance(value, dict) and value is not None
    ]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]"]
            lines += [f"{k} = {_scalar(v)}" for k, v in value.items() if v is not None]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A TOML scalar: JSON's, but TOML has no surrogate pairs and escapes DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
