"""`mainspring rag`: index a folder, search it, ask it, serve it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from mainspring.rag.index import IndexProgress
    from mainspring.rag.ranking.precomputed import PrecomputedLateInteraction
    from mainspring.rag.strategy import Strategy

rag = typer.Typer(
    name="rag", help="Answers from your documents: index a folder, search it, ask it.", no_args_is_help=True
)

_INDEX_NAME = ".mainspring-rag"
_Index = Annotated[Path, typer.Option("--index", help="The index directory.", envvar="MAINSPRING_RAG_INDEX")]
_Strategy = Annotated[
    str, typer.Option(help="default, best, balanced, fast, or a TOML file (`rag strategy` prints one).")
]
_Store = Annotated[
    str | None, typer.Option(help="Milvus instead of LanceDB: http://host:19530, or a file ending in .db.")
]
_Where = Annotated[
    list[str] | None, typer.Option(help="Filter: file, kind or title; kind=md, file^=docs/ (begins with).")
]
_Model = Annotated[
    str,
    typer.Option(
        help="Who answers: smollm2, a Hugging Face directory, a GGUF file, or http://host/v1 (#model to name one)."
    ),
]


@rag.callback()
def _group() -> None:
    """Answers from your documents: index a folder, search it, ask it."""


@rag.command()
def index(
    folder: Annotated[Path, typer.Argument(help="The folder with the documents.")],
    directory: _Index = Path(_INDEX_NAME),
    strategy: _Strategy = "default",
    store: _Store = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Delete the index first.")] = False,
) -> None:
    """Index a folder: Markdown, text, HTML, PDF, DOCX, reStructuredText, notebooks, source code.

    Run it again after changes: only changed files are read, deleted ones leave the index. It can be stopped at any
    time and goes on the next time.
    """
    from mainspring.rag.assembly import make_reranker, open_index
    from mainspring.rag.index import remove_index
    from mainspring.rag.ranking.precomputed import PrecomputedLateInteraction
    from mainspring.rag.strategy import load_strategy

    chosen = load_strategy(strategy)
    console = Console(stderr=True)
    if rebuild:
        remove_index(directory)
    with console.status("Loading the embedding model"):
        opened = open_index(directory, chosen, store=store)
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        report = opened.update(folder, _bar(progress))
    if isinstance(reranker := make_reranker(chosen, directory), PrecomputedLateInteraction):
        _precompute(console, reranker, [chunk.indexed_text for chunk in opened.store.scan()])
    for name, reason in report.failures:
        console.print(
            f"[yellow]left out[/] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True
        )
    typer.echo(
        f"{report.added} new, {report.changed} changed, {report.removed} removed, {report.unchanged} unchanged, "
        f"{len(report.failures)} left out; {report.chunks} passages in {directory}"
    )


def _bar(progress: Progress) -> IndexProgress:
    """Bytes of documents as a bar with the time that is left."""
    from mainspring.rag.index import IndexProgress

    class Bar(IndexProgress):
        def __init__(self) -> None:
            self._task = progress.add_task("Indexing", total=None)

        def begin(self, total_bytes: int, unchanged: int) -> None:
            progress.update(self._task, total=total_bytes)

        def read(self, file: str, size: int) -> None:
            progress.update(self._task, advance=size, description=escape(file[-40:]))

        def finishing(self) -> None:
            progress.update(self._task, description="Search structures")

    return Bar()


def _precompute(console: Console, reranker: PrecomputedLateInteraction, texts: list[str]) -> None:
    columns = (TextColumn("Token vectors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(texts))
        for first in range(0, len(texts), 64):
            part = texts[first : first + 64]
            reranker.prepare(part)
            progress.advance(task, len(part))


@rag.command()
def search(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    directory: _Index = Path(_INDEX_NAME),
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="How many passages.")] = 5,
    strategy: _Strategy = "default",
    store: _Store = None,
    where: _Where = None,
    model: Annotated[
        str | None, typer.Option(help="A language model, for strategies that rewrite the query.")
    ] = None,
) -> None:
    """Print the passages that best answer a question, each with its file and place."""
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.stores.store import Condition

    conditions = [Condition.parse(text) for text in where or ()]
    with _loading():
        pipeline = open_pipeline(
            directory,
            _loaded(strategy),
            store=store,
            model=open_model(model) if model is not None else None,
            citations=False,
        )
    for number, passage in enumerate(pipeline.search(question, k, conditions), 1):
        chunk = passage.chunk
        typer.echo(f"[{number}] {chunk.file}, {chunk.place}  ({passage.score:.3f})")
        typer.echo("    " + "\n    ".join(chunk.text.strip().splitlines()) + "\n")


@rag.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    directory: _Index = Path(_INDEX_NAME),
    model: _Model = "smollm2",
    strategy: _Strategy = "default",
    store: _Store = None,
    where: _Where = None,
) -> None:
    """Answer a question from the documents. The answer streams; supported statements carry [n], listed below it."""
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.pipeline import Answer, Delta
    from mainspring.rag.stores.store import Condition

    conditions = [Condition.parse(text) for text in where or ()]
    with _loading():
        pipeline = open_pipeline(directory, _loaded(strategy), store=store, model=open_model(model))
    for event in pipeline.ask(question, conditions):
        if isinstance(event, Delta):
            sys.stdout.write(event.text)
        elif isinstance(event, Answer):
            sys.stdout.write("\n")
            if event.citations:
                sys.stdout.write("\n" + "\n".join(dict.fromkeys(map(str, event.citations))) + "\n")
        else:
            sys.stdout.write(f" [{event.number}] ")
        sys.stdout.flush()


@rag.command()
def serve(
    directory: _Index = Path(_INDEX_NAME),
    model: Annotated[
        str | None, typer.Option(help="Who answers, as for `ask`; none: searching only.")
    ] = None,
    strategy: _Strategy = "default",
    store: _Store = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8001,
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Speak MCP on standard input and output instead.")
    ] = False,
) -> None:
    """Serve an index: POST /v1/search and /v1/ask, and MCP tools `search` and `ask` at /mcp."""
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.serving.live import LivePipeline

    with _loading():
        answering = open_model(model) if model is not None else None
        pipeline = open_pipeline(directory, _loaded(strategy), store=store, model=answering)
    live = LivePipeline(directory, pipeline)
    if stdio:
        from mainspring.rag.serving.mcp_server import mcp_server

        mcp_server(live).run("stdio")
        return
    import uvicorn

    from mainspring.rag.serving.api import make_app

    Console(stderr=True).print(f"http://{host}:{port}  (search, ask, MCP at /mcp)", highlight=False)
    uvicorn.run(make_app(live, host), host=host, port=port, log_level="warning")


@rag.command()
def strategy(
    name: Annotated[str, typer.Argument(help="default, best, balanced, fast, or a TOML file.")] = "default",
) -> None:
    """Print a strategy as TOML, to change and to give to --strategy."""
    from mainspring.rag.strategy import to_toml

    typer.echo(to_toml(_loaded(name)), nl=False)


def _loaded(name: str) -> Strategy:
    from mainspring.rag.strategy import load_strategy

    return load_strategy(name)


def _loading() -> AbstractContextManager[object]:
    console = Console(stderr=True)
    return console.status("Loading the models") if console.is_terminal else nullcontext()
