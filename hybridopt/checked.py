"""Structs that hold to the rule of every field, and the ranges that most rules use."""

from __future__ import annotations

import math
from typing import Annotated, get_type_hints

import msgspec
from msgspec import Meta

from hybridopt.errors import ConfigError

__all__ = [
    "Checked",
    "Count",
    "CountOrZero",
    "Fraction",
    "NonNegative",
    "OpenFraction",
    "Positive",
]

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Meta(gt=0.0, lt=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]


class Checked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Enforces each field's ``Meta`` on every way of building a struct.

    msgspec checks ``Meta`` when it decodes but not in constructors, so the values are
    converted to their own declared types once more here.
    """

    def __post_init__(self) -> None:
        owner = type(self)
        hints = get_type_hints(owner, include_extras=True)
        for field in owner.__struct_fields__:
            value = getattr(self, field)
            plain = msgspec.to_builtins(value)
            try:
                converted = msgspec.convert(plain, hints[field])
            except msgspec.ValidationError as error:
                raise ConfigError(
                    f"{owner.__name__}.{field}={value!r}: {error}. "
                    f"See docs/configuration.md for the range of {field!r}."
                ) from None
            if isinstance(converted, float) and not math.isfinite(converted):
                raise ConfigError(
                    f"{owner.__name__}.{field}={value!r}: must be finite. "
                    "Use a large number instead of inf."
                )
            # Integers given for float fields become floats, so that equal
            # configurations are equal bytes; the struct is frozen for everyone else.
            msgspec.structs.force_setattr(self, field, converted)
