"""What several `mainspring rag` commands share: their options, how a strategy is named and an answer written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mainspring.rag.pipeline import Event
    from mainspring.rag.strategy import Strategy

INDEX_NAME = ".mainspring-rag"
Index = Annotated[Path, typer.Option("--index", help="The index directory.", envvar="MAINSPRING_RAG_INDEX")]
StrategyName = Annotated[
    str, typer.Option(help="default, best, balanced, fast, fine, or a TOML file (`rag strategy` prints one).")
]
Store = Annotated[
    str | None, typer.Option(help="Milvus instead of LanceDB: http://host:19530, or a file ending in .db.")
]
Where = Annotated[
    list[str] | None, typer.Option(help="Filter: file, kind or title; kind=md, file^=docs/ (begins with).")
]
Model = Annotated[
    str,
    typer.Option(
        help="Who answers: smollm2, a Hugging Face directory, a GGUF file, or http://host/v1 (#model to name one)."
    ),
]


def loaded(name: str) -> Strategy:
    """A strategy by its name or file. Raises ConfigError."""
    from mainspring.rag.strategy import load_strategy

    return load_strategy(name)


def loading() -> AbstractContextManager[object]:
    """What a terminal shows while models are read."""
    console = Console(stderr=True)
    return console.status("Loading the models") if console.is_terminal else nullcontext()


def write_answer(events: Iterable[Event]) -> None:
    """Streams an answer to standard output, its citations as numbers, which are listed below it."""
    from mainspring.rag.pipeline import Answer, Delta

    for event in events:
        if isinstance(event, Delta):
            sys.stdout.write(event.text)
        elif isinstance(event, Answer):
            sys.stdout.write("\n")
            if event.citations:
                sys.stdout.write("\n" + "\n".join(dict.fromkeys(map(str, event.citations))) + "\n")
        else:
            sys.stdout.write(f" [{event.number}] ")
        sys.stdout.flush()
