"""Renders one chat template in a process of its own: run as a script by `chat_template.py`, never imported by it.

A template comes with a checkpoint, from elsewhere. The jinja2 sandbox keeps it from Python's internals, but not
from endless loops, huge powers or strings of terabytes, some of which are single steps that no check inside the
interpreter can interrupt. Here the operating system bounds memory and processor time, and the parent ends the
process when its patience is over.

Messages both ways are a 4-byte little-endian length and that much JSON. The process says {"text": ""} when it is
ready. The first request holds the template and the limits, each further one the variables of a rendering; the
answer is {"text": ...} or {"error": ...}. The process ends when its input does.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training masks; rendering just passes them through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: that of transformers' `apply_chat_template`."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML characters.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _render(template: jinja2.Template, variables: Mapping[str, Any], max_characters: int) -> dict[str, str]:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > max_characters:
            return {"error": f"its output exceeds the limit of {max_characters} characters"}
    return {"text": "".join(pieces)}


def _guarded(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return work()
    except MemoryError:
        return {"error": "it needs more memory than its limit"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except jinja2.TemplateError as error:
        return {"error": error.message or type(error).__name__}
    except Exception as error:  # whatever an expression of the template can raise is its failure
        return {"error": f"{type(error).__name__}: {error}"}


def _limit_processor_time(seconds: float) -> None:
    """Ends this process if it goes on for `seconds` more: nobody may be left to end it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, hard))


def _receive(stream: BinaryIO) -> Any:
    prefix = stream.read(4)
    if len(prefix) < 4:
        return None
    (size,) = struct.unpack("<I", prefix)
    return json.loads(stream.read(size))


def _send(stream: BinaryIO, answer: Mapping[str, str]) -> None:
    data = json.dumps(answer).encode()
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def main() -> None:
    """Answers rendering requests on the standard streams until the input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _send(sink, {"text": ""})
    first = _receive(source)
    if first is None:
        return
    seconds, max_characters = float(first["seconds"]), int(first["max_characters"])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (int(first["max_bytes"]), hard))
    compiled: list[jinja2.Template] = []

    def compile_template() -> dict[str, str]:
        compiled.append(make_environment().from_string(str(first["template"])))
        return {"text": ""}

    _limit_processor_time(seconds)
    answer = _guarded(compile_template)
    _send(sink, answer)
    while compiled and (variables := _receive(source)) is not None:
        _limit_processor_time(seconds)

        def work(variables: Mapping[str, Any] = variables) -> dict[str, str]:
            return _render(compiled[0], variables, max_characters)

        _send(sink, _guarded(work))


if __name__ == "__main__":
    main()
