"""Arguments that a model writes as plain text, turned into JSON by the function's schema, piece by piece."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 8  # of references and alternatives


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema admits; empty if it does not say. root: where its references point into."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return frozenset()
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for key in reference[2:].split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        return types_of(target, root, depth + 1)
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset({declared})
    if isinstance(declared, list):
        return frozenset(name for name in declared if isinstance(name, str))
    if "const" in schema:
        return frozenset({_type_name(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(map(_type_name, schema["enum"]))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = [types_of(choice, root, depth + 1) for choice in schema[key]]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()


def parameter_types(parameters: Mapping[str, Any] | None, key: str) -> frozenset[str]:
    """The JSON types of one parameter of a function, whose parameters have this schema."""
    properties = (parameters or {}).get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return types_of(schema, parameters or {})


class ArgumentWriter:
    """Writes `{"key": value, ...}`. A value that can only be a string goes out as it comes, others when complete."""

    def __init__(self, parameters: Mapping[str, Any] | None) -> None:
        self._parameters = parameters
        self._count = 0
        self._types: frozenset[str] = frozenset()
        self._value: list[str] = []
        self._open = False

    def begin(self, key: str) -> str:
        """A parameter begins. Returns what it adds to the JSON text, as the other methods do."""
        self._types = parameter_types(self._parameters, key)
        self._value, self._open = [], True
        head = f"{'{' if self._count == 0 else ', '}{json.dumps(key, ensure_ascii=False)}: "
        self._count += 1
        return head + ('"' if self._streams else "")

    def push(self, text: str) -> str:
        """More of its value."""
        if self._streams:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._value.append(text)
        return ""

    def end(self) -> str:
        """Its value is complete."""
        self._open = False
        return '"' if self._streams else json_value("".join(self._value), self._types)

    def close(self) -> str:
        """The call is complete."""
        return "{}" if self._count == 0 else "}"

    def cut_off(self) -> str:
        """The text has ended inside a value: what there is of it."""
        return "" if self._streams or not self._open else "".join(self._value)

    @property
    def _streams(self) -> bool:
        return self._types == {"string"}


def json_value(text: str, types: frozenset[str]) -> str:
    """The JSON text of a value that was written plainly. types: what it may be; empty: anything.

    What is JSON stays as it was written; Python's True, None and single quotes become JSON; the rest is a string, as is
    what would be of a type that the value may not have where it may be a string.
    """
    written = text.strip()
    try:
        value = json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(written)
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return json.dumps(text, ensure_ascii=False)
    if "string" in types and not _is_of(value, types):
        return json.dumps(text, ensure_ascii=False)
    return written


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_of(value: Any, types: frozenset[str]) -> bool:
    name = _type_name(value)
    return name in types or (name == "integer" and "number" in types)


def _type_name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"
