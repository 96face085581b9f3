"""The groups of a run's rollouts.jsonl, each as a page to read."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mainspring.errors import ConfigError


class AnswerRecord(msgspec.Struct):
    """An answer as the run logged it; where a critic gives advantages to tokens, theirs is the mean."""

    text: str
    reward: float
    advantage: float
    tokens: int
    finished: bool
    versions: tuple[int, int]


class GroupRecord(msgspec.Struct):
    """A line of rollouts.jsonl."""

    step: int
    prompt: str
    reference: str
    answers: list[AnswerRecord]


def read_groups(run: Path, step: int | None, mixed: bool) -> Iterator[GroupRecord]:
    """Those of a step if one is given, and whose rewards differ if `mixed`.

    Raises ConfigError if there is no such file, or a line (named) is not of it; the last one may be cut off.
    """
    if not run.is_dir():
        yield from _read_file(run, step, mixed)
        return
    # Of several ranks each has written its own, step by step.
    paths = [run / "rollouts.jsonl", *sorted(run.glob("rollouts-*.jsonl"))]
    files = [_read_file(path, step, mixed) for path in paths]
    yield from heapq.merge(*files, key=lambda record: record.step)


def _read_file(path: Path, step: int | None, mixed: bool) -> Iterator[GroupRecord]:
    decoder = msgspec.json.Decoder(GroupRecord)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # of a run that is being written, or was killed
                try:
                    record = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ConfigError(f"{path}, line {number} is no group of rollouts: {error}") from error
                if step is not None and record.step != step:
                    continue
                if mixed and len({answer.reward for answer in record.answers}) < 2:
                    continue
                yield record
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; give the output directory of a run of `mainspring rl`"
        ) from error


def group_page(record: GroupRecord) -> RenderableType:
    """The prompt above a table of its answers, the best first."""
    table = Table(expand=True)
    for name in ("reward", "advantage", "tokens", "answer"):
        table.add_column(
            name, justify="left" if name == "answer" else "right", ratio=1 if name == "answer" else None
        )
    for answer in sorted(record.answers, key=lambda answer: -answer.reward):
        first, last = answer.versions
        tokens = f"{answer.tokens}" if answer.finished else f"{answer.tokens}, cut off"
        if first != last:
            tokens += f", weights {first} to {last}"
        table.add_row(f"{answer.reward:.3g}", f"{answer.advantage:+.3f}", tokens, Text(answer.text))
    head = Text(record.prompt)
    if record.reference:
        head.append(f"\n\nreference: {record.reference}", style="dim")
    return Group(Panel(head, title=f"step {record.step}", title_align="left"), table)
