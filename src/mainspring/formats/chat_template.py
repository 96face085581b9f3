"""Chat templates: a conversation becomes a prompt through the Jinja source that came with the model.

Templates are untrusted. They are rendered by jinja2's sandbox in a small process of their own, which is started at
the first use, bounded in memory, time and output, and ended when it exceeds them (`_template_worker.py`).
"""

from __future__ import annotations

import json
import os
import secrets
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mainspring.errors import ChatTemplateError

DEFAULT_SECONDS = 5.0
DEFAULT_MAX_CHARACTERS = 4_000_000
_START_SECONDS = 60.0  # a cold interpreter on a busy machine
_MAX_BYTES = 1 << 30
_WORKER = Path(__file__).with_name("_template_worker.py")


class ChatTemplate:
    """One compiled template. `render` may be called from any thread; renderings take turns.

    `max_seconds` bounds one rendering (wall clock), `max_characters` its output. A rendering that exceeds a limit
    raises ChatTemplateError, and the template can be used again.
    """

    def __init__(
        self,
        source: str,
        *,
        max_seconds: float = DEFAULT_SECONDS,
        max_characters: int = DEFAULT_MAX_CHARACTERS,
    ) -> None:
        self.source = source
        self.max_seconds = max_seconds
        self.max_characters = max_characters
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._takes_parts: bool | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of `messages`, each with a `role`; `variables` are handed to the template as they are.

        A `content` that is a list of text parts is handed on if the template can read it, else joined by line
        feeds. Raises ChatTemplateError for malformed messages, a failing template, and exceeded limits.
        """
        prepared = [self._prepare(message, index) for index, message in enumerate(messages)]
        return self._render(prepared, tools, add_generation_prompt, variables)

    def close(self) -> None:
        """Ends the template's process; the next rendering starts another."""
        with self._lock:
            self._drop_worker()

    def _prepare(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"message {index} must be an object with a role, got {str(message)[:80]!r}"
            )
        content = message.get("content")
        if not isinstance(content, list):
            if content is not None and not isinstance(content, str):
                raise ChatTemplateError(
                    f"the content of message {index} must be a string or a list of text parts"
                )
            return dict(message)
        texts = [_part_text(part, index) for part in content]
        if self._reads_parts():
            return {**message, "content": [{"type": "text", "text": text} for text in texts]}
        return {**message, "content": "\n".join(texts)}

    def _reads_parts(self) -> bool:
        """Whether the template finds the text inside a list of parts, rather than printing the list or failing."""
        if self._takes_parts is None:
            mark = secrets.token_hex(8)
            probe = [{"role": "user", "content": [{"type": "text", "text": mark}]}]
            try:
                text = self._render(probe, None, False, {"bos_token": "", "eos_token": ""})
            except ChatTemplateError:
                text = ""
            printed = f"'{mark}'" in text or f'"{mark}"' in text
            self._takes_parts = mark in text and not printed
        return self._takes_parts

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        values = {
            **(variables or {}),
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = json.dumps(values).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the conversation is not plain JSON: {error}") from error
        with self._lock:
            try:
                worker = self._running_worker()
                return worker.ask(request, self.max_seconds)
            except _WorkerFailure as failure:
                self._drop_worker()
                raise ChatTemplateError(f"the chat template was stopped: {failure}") from failure

    def _running_worker(self) -> _Worker:
        # A process forked from this one shares the pipes: it must not speak into them.
        if self._worker is None or self._worker.owner != os.getpid() or not self._worker.is_alive():
            self._drop_worker()
            self._worker = _Worker(self.source, self.max_seconds, self.max_characters)
        return self._worker

    def _drop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and worker.owner == os.getpid():
            worker.stop()


def _part_text(part: object, index: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ChatTemplateError(
        f"message {index} has a content part of type {kind!r}: only text parts are supported"
    )


class _WorkerFailure(Exception):
    """The process has died, or has been too slow."""


class _Worker:
    """The process that renders one template, and the pipes to it."""

    def __init__(self, source: str, max_seconds: float, max_characters: int) -> None:
        self.owner = os.getpid()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # In a session of its own, Ctrl-C in the terminal reaches the server only, which may still need to render.
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self.stop = weakref.finalize(self, _stop, self._process)
        first = {
            "template": source,
            "seconds": max_seconds,
            "max_characters": max_characters,
            "max_bytes": _MAX_BYTES,
        }
        try:
            self._answer(_START_SECONDS)
            self.ask(json.dumps(first).encode(), max_seconds)  # jinja2 works out constants when it compiles
        except BaseException:
            self.stop()
            raise

    def is_alive(self) -> bool:
        return self.stop.alive and self._process.poll() is None

    def ask(self, request: bytes, seconds: float) -> str:
        """The text of the answer; ChatTemplateError if it is an error, _WorkerFailure if there is none in time."""
        sink = self._process.stdin
        assert sink is not None  # both streams are pipes: see the constructor
        try:
            sink.write(struct.pack("<I", len(request)) + request)
            sink.flush()
        except BrokenPipeError:
            raise _WorkerFailure("its process has ended") from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        (size,) = struct.unpack("<I", self._read(4, deadline, seconds))
        answer = json.loads(self._read(size, deadline, seconds))
        if "error" in answer:
            raise ChatTemplateError(f"the chat template fails: {answer['error']}")
        return str(answer["text"])

    def _read(self, size: int, deadline: float, seconds: float) -> bytes:
        source = self._process.stdout
        assert source is not None
        poll = select.poll()
        poll.register(source, select.POLLIN)
        received = bytearray()
        while len(received) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise _WorkerFailure(f"it took longer than {seconds:g} s")
            # Read past the buffered layer, which would wait for more than has come.
            chunk = os.read(source.fileno(), min(size - len(received), 1 << 20))
            if not chunk:
                raise _WorkerFailure("its process has ended (out of memory or processor time?)")
            received += chunk
        return bytes(received)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # what was still buffered has no reader any more
    process.wait()
