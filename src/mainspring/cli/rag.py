"""`mainspring rag`: index a folder, search it, ask it, serve it, find the best strategy for it."""

from __future__ import annotations

from collections.abc import Callable
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

from mainspring.cli.rag_finetune import fine_tune, tuning_data
from mainspring.cli.rag_learn import classify, tune
from mainspring.cli.rag_options import (
    INDEX_NAME,
    Index,
    Model,
    Store,
    StrategyName,
    Where,
    loaded,
    loading,
    write_answer,
)
from mainspring.cli.rag_pictures import Encoder, has_pictures, pictures, update_gallery

if TYPE_CHECKING:
    from mainspring.rag.index import IndexProgress

rag = typer.Typer(
    name="rag", help="Answers from your documents: index a folder, search it, ask it.", no_args_is_help=True
)

rag.add_typer(pictures)


@rag.callback()
def _group() -> None:
    """Answers from your documents: index a folder, search it, ask it."""


@rag.command()
def index(
    folder: Annotated[Path, typer.Argument(help="The folder with the documents.")],
    directory: Index = Path(INDEX_NAME),
    strategy: StrategyName = "default",
    store: Store = None,
    encoder: Encoder = "small",
    with_pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Index the folder's pictures too.")
    ] = True,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Delete the index first.")] = False,
) -> None:
    """Index a folder: Markdown, text, HTML, PDF, DOCX, reStructuredText, notebooks, source code, captioned pictures.

    Run it again after changes: only changed files are read, deleted ones leave the index. It can be stopped at any
    time and goes on the next time.
    """
    from mainspring.rag.assembly import make_reranker, make_sentences, open_index
    from mainspring.rag.documents.reading import find_files
    from mainspring.rag.index import remove_index
    from mainspring.rag.ranking.precomputed import PrecomputedLateInteraction
    from mainspring.rag.strategy import load_strategy

    chosen = load_strategy(strategy)
    console = Console(stderr=True)
    find_files(
        folder, [directory]
    )  # before a model is loaded, or an index deleted, for a folder without documents
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
        texts = [chunk.indexed_text for chunk in opened.store.scan()]
        _precompute(console, "Token vectors", reranker.prepare, texts)
    if (sentences := make_sentences(chosen, directory, opened.embedder)) is not None:
        texts = [chunk.text for chunk in opened.store.scan()]
        _precompute(console, "Sentence vectors", sentences.prepare, texts)
    for name, reason in report.failures:
        console.print(
            f"[yellow]left out[/] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True
        )
    typer.echo(
        f"{report.added} new, {report.changed} changed, {report.removed} removed, {report.unchanged} unchanged, "
        f"{len(report.failures)} left out; {report.chunks} passages in {directory}"
    )
    if with_pictures and has_pictures(folder, directory):
        update_gallery(folder, directory, encoder, console, documents=False)


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


def _precompute(console: Console, what: str, prepare: Callable[[list[str]], None], texts: list[str]) -> None:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(texts))
        for first in range(0, len(texts), 64):
            part = texts[first : first + 64]
            prepare(part)
            progress.advance(task, len(part))


@rag.command()
def search(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    directory: Index = Path(INDEX_NAME),
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="How many passages.")] = 5,
    strategy: StrategyName = "default",
    store: Store = None,
    where: Where = None,
    model: Annotated[
        str | None, typer.Option(help="A language model, for strategies that rewrite the query.")
    ] = None,
) -> None:
    """Print the passages that best answer a question, each with its file and place."""
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.stores.store import Condition

    conditions = [Condition.parse(text) for text in where or ()]
    with loading():
        pipeline = open_pipeline(
            directory,
            loaded(strategy),
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
    directory: Index = Path(INDEX_NAME),
    model: Model = "smollm2",
    strategy: StrategyName = "default",
    store: Store = None,
    where: Where = None,
) -> None:
    """Answer a question from the documents. The answer streams; supported statements carry numbers, listed below."""
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.stores.store import Condition

    conditions = [Condition.parse(text) for text in where or ()]
    with loading():
        pipeline = open_pipeline(directory, loaded(strategy), store=store, model=open_model(model))
    write_answer(pipeline.ask(question, conditions))


@rag.command()
def serve(
    directory: Index = Path(INDEX_NAME),
    model: Annotated[
        str | None, typer.Option(help="Who answers, as for `ask`; none: searching only.")
    ] = None,
    strategy: StrategyName = "default",
    store: Store = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8001,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MAINSPRING_API_KEY", help="A key that opens the API and MCP; may be repeated."),
    ] = None,
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Speak MCP on standard input and output instead.")
    ] = False,
) -> None:
    """Serve an index: POST /v1/search and /v1/ask, and MCP tools `search` and `ask` at /mcp."""
    from mainspring.errors import ConfigError
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.serving.live import LivePipeline

    if not all(api_key or ()):
        raise ConfigError("an API key is empty: give --api-key KEY, or leave the option out")

    with loading():
        answering = open_model(model) if model is not None else None
        pipeline = open_pipeline(directory, loaded(strategy), store=store, model=answering)
    live = LivePipeline(directory, pipeline)
    if stdio:
        from mainspring.rag.serving.mcp_server import mcp_server

        mcp_server(live).run("stdio")
        return
    import uvicorn

    from mainspring.rag.serving.api import make_app

    Console(stderr=True).print(f"http://{host}:{port}  (search, ask, MCP at /mcp)", highlight=False)
    uvicorn.run(make_app(live, host, api_key or ()), host=host, port=port, log_level="warning")


@rag.command()
def strategy(
    name: Annotated[str, typer.Argument(help="default, best, balanced, fast, or a TOML file.")] = "default",
) -> None:
    """Print a strategy as TOML, to change and to give to --strategy."""
    from mainspring.rag.strategy import to_toml

    typer.echo(to_toml(loaded(name)), nl=False)


rag.command()(tune)
rag.command("tuning-data")(tuning_data)
rag.command("fine-tune")(fine_tune)
rag.command()(classify)
