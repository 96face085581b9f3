"""Reads typed values out of untrusted JSON objects; a refusal names the key, its value and the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mainspring.errors import ConfigError


class _Required:
    """Marks a key without a default."""


REQUIRED = _Required()


def read_int(
    d: Mapping[str, Any], key: str, default: int | _Required | None = REQUIRED, minimum: int = 0
) -> int:
    """The integer under `key`, null counting as absent; ConfigError if absent (no default) or too small."""
    value = d.get(key)
    if value is None:
        value = default
    if isinstance(value, _Required) or value is None:
        raise ConfigError(f"the model configuration lacks {key!r}: give it an integer >= {minimum}")
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(
            f"{key!r} is {value!r} in the model configuration: it must be an integer >= {minimum}"
        )
    return value


def read_optional_int(d: Mapping[str, Any], key: str, minimum: int = 0) -> int | None:
    """As `read_int`, but None where the key is absent or null."""
    return None if d.get(key) is None else read_int(d, key, minimum=minimum)


def read_float(
    d: Mapping[str, Any], key: str, default: float | _Required = REQUIRED, *, above: float = -math.inf
) -> float:
    """The finite number under `key`, strictly above `above`; null counts as absent; else ConfigError."""
    value = d.get(key)
    if value is None:
        value = default
    if isinstance(value, _Required):
        raise ConfigError(f"the model configuration lacks {key!r}: give it a number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key!r} is {value!r} in the model configuration: it must be a finite number")
    if value <= above:
        raise ConfigError(
            f"{key!r} is {value!r} in the model configuration: it must be greater than {above:g}"
        )
    return float(value)


def read_optional_float(d: Mapping[str, Any], key: str, *, above: float = -math.inf) -> float | None:
    """As `read_float`, but None where the key is absent or null."""
    return None if d.get(key) is None else read_float(d, key, above=above)


def read_bool(d: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean under `key`; null counts as absent."""
    value = d.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key!r} is {value!r} in the model configuration: it must be true or false")
    return value


def read_str(d: Mapping[str, Any], key: str, default: str) -> str:
    """The string under `key`; null counts as absent."""
    value = d.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ConfigError(f"{key!r} is {value!r} in the model configuration: it must be a string")
    return value


def read_token_ids(d: Mapping[str, Any], key: str, default: int | None) -> tuple[int, ...]:
    """One token id, a list of them, or null, as a tuple; negative ids (an old way to say none) go."""
    value = d.get(key, default)
    items = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise ConfigError(
            f"{key!r} is {value!r} in the model configuration: it must be a token id or a list of them"
        )
    return tuple(dict.fromkeys(item for item in items if item >= 0))
