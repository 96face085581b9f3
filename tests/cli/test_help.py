"""`--help` of every command: all is described, and what is written is shown."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import typer
from rich.text import Text

from mainspring.cli.main import app


def commands(name: str, command: object) -> Iterator[tuple[str, object]]:
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {child}", below)


COMMANDS = dict(commands("mainspring", typer.main.get_command(app)))


def test_the_walk_finds_commands_below_commands() -> None:
    assert {"mainspring serve", "mainspring bench throughput", "mainspring rag pictures ask"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_is_described_and_brackets_are_not_taken_for_markup(name: str) -> None:
    command = COMMANDS[name]
    texts = {name: command.help} | {parameter.name: parameter.help for parameter in command.params}
    for what, text in texts.items():
        assert text, what
        assert Text.from_markup(text).plain == text, what
