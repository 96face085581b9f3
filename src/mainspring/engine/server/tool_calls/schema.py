"""The JSON schema that holds a model to calls: for tool_choice "required" and for a named function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_DEFINITIONS = ("$defs", "definitions")


def calls_schema(
    functions: Sequence[tuple[str, Mapping[str, Any] | None]], *, parallel: bool, arguments: str = "arguments"
) -> dict[str, Any]:
    """A list of at least one call of these functions, each a name and the schema of its parameters.

    arguments: the key of the arguments in a call.

    Each function's own definitions move to the root of the whole, under a name of their own, and its
    references with them. Without `parallel` the list holds exactly one call.
    """
    definitions: dict[str, Any] = {}
    choices: list[dict[str, Any]] = []
    for number, (name, parameters) in enumerate(functions):
        schema = arguments_schema(parameters)
        renamed: dict[str, str] = {}
        for place in _DEFINITIONS:
            found = schema.pop(place, None)
            for key, value in (found if isinstance(found, dict) else {}).items():
                renamed[f"#/{place}/{key}"] = f"#/$defs/{number}.{key}"
                definitions[f"{number}.{key}"] = value
        for key in [key for key in definitions if key.startswith(f"{number}.")]:
            definitions[key] = _with_references(definitions[key], renamed)
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, arguments: _with_references(schema, renamed)},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    whole: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": choices}}
    if not parallel:
        whole["maxItems"] = 1
    if definitions:
        whole["$defs"] = definitions
    return whole


def calls_or_answer_grammar(
    functions: Sequence[tuple[str, Mapping[str, Any] | None]], answer: Mapping[str, Any], *, parallel: bool
) -> str:
    """In Lark's notation: calls in the tags of Hermes, or else an answer that follows a schema."""
    call = calls_schema(functions, parallel=parallel)
    # The schema of one call, with the definitions of them all.
    one = {**call["items"], "$defs": call.get("$defs", {})}
    lines = [
        "start: answer | calls",
        f"answer: %json {spaced(answer)}",
        'calls: call ("\\n" call)*' if parallel else "calls: call",
        'call: "<tool_call>\\n" object "\\n</tool_call>"',
        f"object: %json {spaced(one)}",
    ]
    return "\n".join(lines)


def spaced(schema: Mapping[str, Any]) -> str:
    """The schema's JSON, with white space between the parts of what follows it, but not for ever."""
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}})


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of one function's arguments; a function without parameters takes none."""
    if parameters:
        return dict(parameters)
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _with_references(schema: Any, renamed: Mapping[str, str]) -> Any:
    """The schema with its references renamed."""
    if isinstance(schema, list):
        return [_with_references(item, renamed) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: renamed.get(value, value)
        if key == "$ref" and isinstance(value, str)
        else _with_references(value, renamed)
        for key, value in schema.items()
    }
