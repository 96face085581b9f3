"""Grammars that leave a model free to write text, and hold every call it begins to the functions' schemas.

What begins a call (its opening tag, or for Llama 3 a brace at the beginning) is the trigger: from there on only a call
of one of the functions is possible. In Lark's notation, as llguidance reads it; a tag that is a special token of the
tokenizer is named as such, for the text of a grammar does not match those.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mainspring.engine.server.tool_calls import bare_json, hermes, tagged
from mainspring.engine.server.tool_calls.argument_values import types_of
from mainspring.engine.server.tool_calls.formats import ToolFormat
from mainspring.engine.server.tool_calls.schema import arguments_schema, calls_schema, spaced
from mainspring.engine.server.tool_calls.tagged import Tags
from mainspring.errors import InvalidRequestError

_SPACE = r"/[\x20\n]{0,4}/"


@dataclass(frozen=True, slots=True)
class StrictFunction:
    """A function that may be called. strict: its schema is enforced; else its arguments are any object."""

    name: str
    parameters: Mapping[str, Any] | None
    strict: bool


def strict_grammar(
    form: ToolFormat | None, functions: Sequence[StrictFunction], *, parallel: bool, special: Collection[str]
) -> str:
    """For answers in which calls may come. special: texts of the tokenizer's special tokens.

    Raises:
        InvalidRequestError: a function is strict, and the model's format of calls cannot be held to a schema.
    """
    match form:
        case "hermes":
            return _hermes(functions, parallel, special)
        case "llama3_json":
            return _llama(functions, parallel, special)
        case "qwen3_coder":
            return _tagged(tagged.QWEN3_CODER, functions, parallel, special)
        case "glm45":
            return _tagged(tagged.GLM45, functions, parallel, special)
        case _:
            strict = next(function.name for function in functions if function.strict)
            raise InvalidRequestError(
                f"the function {strict!r} is strict, but calls in the format {form} cannot be held to a schema; leave "
                'strict out, or set tool_choice to "required"',
                "tools",
            )


def _hermes(functions: Sequence[StrictFunction], parallel: bool, special: Collection[str]) -> str:
    lines = _triggered(hermes.OPEN, parallel, special)
    return "\n".join(
        [
            *lines,
            f"call: space object space {_literal(hermes.CLOSE, special)}",
            f"space: {_SPACE}",
            f"object: %json {spaced(_one_call(functions, 'arguments'))}",
        ]
    )


def _llama(functions: Sequence[StrictFunction], parallel: bool, special: Collection[str]) -> str:
    tag = _literal(bare_json.PYTHON_TAG, special)
    return "\n".join(
        [
            "start: PLAIN | calls",
            r"PLAIN: /([\x20\n]*[^{\[<\x20\n](.|\n)*)?/",
            f"calls: ({tag})? object" + (r" (/;[\x20\n]{0,2}/ object)*" if parallel else ""),
            f"object: %json {spaced(_one_call(functions, 'parameters'))}",
        ]
    )


def _one_call(functions: Sequence[StrictFunction], key: str) -> dict[str, Any]:
    """The schema of a call of one of the functions."""
    loose = {"type": "object"}
    pairs = [(f.name, f.parameters if f.strict else loose) for f in functions]
    schema = calls_schema(pairs, parallel=True, arguments=key)
    return {**schema["items"], "$defs": schema.get("$defs", {})}


def _tagged(tags: Tags, functions: Sequence[StrictFunction], parallel: bool, special: Collection[str]) -> str:
    rules: list[str] = []
    for number, function in enumerate(functions):
        head = f"{tags.name_open}{function.name}{tags.name_close}\n"
        parameters = _parameters(tags, function, f"f{number}", rules, special)
        end = [_literal(tags.call_close, special)]
        if tags.call_close != tags.outer_close:
            end += ['"\\n"', _literal(tags.outer_close, special)]
        rules.append(f"f{number}: {_text(head, special)} {' '.join([*parameters, *end])}")
    names = " | ".join(f"f{number}" for number in range(len(functions)))
    before = '"\\n"?' if tags.name_open else ""
    return "\n".join([*_triggered(tags.outer_open, parallel, special), f"call: {before} ({names})", *rules])


def _parameters(
    tags: Tags, function: StrictFunction, prefix: str, rules: list[str], special: Collection[str]
) -> list[str]:
    """The names of rules of a function's parameters, in the order of its schema; adds the rules."""
    line = "\n" if tags.on_lines else ""
    close = f"{line}{tags.value_close}\n"
    between = f"{tags.key_close}\n" if not tags.value_open else f"{tags.key_close}\n{tags.value_open}"
    if not function.strict:
        rules.append(
            f"{prefix}any: {_text(tags.key_open, special)} /[^<>\\n]+/ {_text(between, special)} {prefix}v"
        )
        _any_text(f"{prefix}v", close, rules, special)
        return [f"{prefix}any*"]
    root = arguments_schema(function.parameters)
    properties = root.get("properties")
    required = root.get("required", [])
    found = []
    for number, (key, schema) in enumerate(properties.items() if isinstance(properties, dict) else ()):
        name = f"{prefix}p{number}"
        values = schema.get("enum") if isinstance(schema, dict) else None
        if types_of(schema, root) != {"string"}:
            definitions = {place: root[place] for place in ("$defs", "definitions") if place in root}
            whole = {**schema, **definitions} if isinstance(schema, dict) else schema
            rules.append(f"{name}v: {name}j {_text(close, special)}")
            rules.append(f"{name}j: %json {spaced(whole) if isinstance(whole, dict) else json.dumps(whole)}")
        elif isinstance(values, list):
            choices = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
            rules.append(f"{name}v: ({choices}) {_text(close, special)}")
        else:
            _any_text(f"{name}v", close, rules, special)
        rules.append(f"{name}: {_text(f'{tags.key_open}{key}{between}', special)} {name}v")
        found.append(name if key in required else f"{name}?")
    return found


def _any_text(name: str, close: str, rules: list[str], special: Collection[str]) -> None:
    """A rule of any text up to a closing tag."""
    if any(token in close for token in special):
        rules.append(f"{name}: TEXT {_text(close, special)}")
    else:
        rules.append(f"{name}[lazy]: TEXT {_text(close, special)}")


def _triggered(tag: str, parallel: bool, special: Collection[str]) -> list[str]:
    """Text, in which the tag begins a call."""
    start = "start: (opening call)* end" if parallel else "start: end | opening call"
    lines = [start, "end: TEXT", r"TEXT: /(.|\n)*/"]
    if tag in special:
        return [*lines, f"opening: TEXT {tag}"]
    return [*lines, f"opening[lazy]: TEXT {json.dumps(tag)}"]


def _literal(text: str, special: Collection[str]) -> str:
    """A tag: a special token or a text."""
    return text if text in special else json.dumps(text, ensure_ascii=False)


def _text(text: str, special: Collection[str]) -> str:
    """A text in which special tokens may stand."""
    pieces: list[str] = []
    rest = text
    while rest:
        places = [(rest.find(token), token) for token in special if token and token in rest]
        place, token = min(places, key=lambda found: (found[0], -len(found[1])), default=(len(rest), ""))
        if place:
            pieces.append(json.dumps(rest[:place], ensure_ascii=False))
        if token:
            pieces.append(token)
        rest = rest[place + len(token) :]
    return " ".join(pieces)
