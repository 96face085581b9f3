"""`mainspring rag`: index a folder, search it, ask it, serve it, find the best strategy for it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
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
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mainspring.cli.rag_pictures import pictures

if TYPE_CHECKING:
    from mainspring.rag.chunking.chunk import Chunk
    from mainspring.rag.generation.language_model import LanguageModel
    from mainspring.rag.index import IndexProgress
    from mainspring.rag.search.questions import TuneQuestion
    from mainspring.rag.strategy import Strategy

rag = typer.Typer(
    name="rag", help="Answers from your documents: index a folder, search it, ask it.", no_args_is_help=True
)

rag.add_typer(pictures)

_INDEX_NAME = ".mainspring-rag"
_Index = Annotated[Path, typer.Option("--index", help="The index directory.", envvar="MAINSPRING_RAG_INDEX")]
_Strategy = Annotated[
    str, typer.Option(help="default, best, balanced, fast, fine, or a TOML file (`rag strategy` prints one).")
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
    from mainspring.rag.assembly import make_reranker, make_sentences, open_index
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
    """Answer a question from the documents. The answer streams; supported statements carry numbers, listed below."""
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
    uvicorn.run(make_app(live, host, api_key or ()), host=host, port=port, log_level="warning")


@rag.command()
def strategy(
    name: Annotated[str, typer.Argument(help="default, best, balanced, fast, or a TOML file.")] = "default",
) -> None:
    """Print a strategy as TOML, to change and to give to --strategy."""
    from mainspring.rag.strategy import to_toml

    typer.echo(to_toml(_loaded(name)), nl=False)


@rag.command()
def tune(
    latency_p95: Annotated[str, typer.Option(help="What the p95 may be, without generation: 800ms or 1.5s.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines: {"question": ..., "evidence": ["a text of the passage"], "file": ...}. '
            "Without it --model makes some from the documents."
        ),
    ] = None,
    directory: _Index = Path(_INDEX_NAME),
    strategy: Annotated[
        str, typer.Option(help="The present strategy: where to start, what to beat.")
    ] = "default",
    space: Annotated[
        Path | None, typer.Option(help="A TOML file with a list of values for each setting.")
    ] = None,
    budget: Annotated[
        int, typer.Option(min=1, help="Evaluations (strategy x question) of each search.")
    ] = 2000,
    beam: Annotated[int, typer.Option(min=1, help="Strategies that are kept from step to step.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the split, and of the strategies drawn at random.")] = 0,
    store: _Store = None,
    model: Annotated[
        str | None, typer.Option(help="A language model: adds query forms and summaries by it.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="The indexed folder: ways of cutting and embedding join the space, an index each."),
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Quality is the answer's F1 against the evidence (by --model).")
    ] = False,
    make: Annotated[int, typer.Option(min=40, help="How many questions are made without --questions.")] = 100,
    recipe: Annotated[Path, typer.Option(help="Where the strategy goes, as TOML.")] = Path("strategy.toml"),
    report: Annotated[Path, typer.Option(help="Where the evidence goes, as one HTML page.")] = Path(
        "tune.html"
    ),
) -> None:
    """Find the strategy with the best quality for a latency, on your questions; held-out ones decide.

    Searches whole strategies (beam, then successive halving) and module by module with as many evaluations. Nothing
    is called better unless the interval of a paired bootstrap lies above zero. Run again, it goes on from what is kept.
    """
    from mainspring.formats.files import write_file
    from mainspring.rag.assembly import open_evaluator, open_model, open_variants
    from mainspring.rag.search.questions import answerable, load_questions
    from mainspring.rag.search.report import report as page
    from mainspring.rag.search.space import changes, default_space, load_space
    from mainspring.rag.search.tune import TuneSettings
    from mainspring.rag.search.tune import tune as search_strategies
    from mainspring.rag.strategy import to_toml

    settings = TuneSettings(_seconds(latency_p95), budget, beam, seed=seed)
    asked, present = load_questions(questions) if questions is not None else (), _loaded(strategy)
    if space is not None:
        wanted = load_space(space, with_index=folder is not None)
    else:
        wanted = default_space(model is not None, folder is not None, answers)
    with _loading():
        answering = open_model(model) if model is not None else None
        evaluate = (
            open_variants(directory, folder, present, model=answering, answers=answers)
            if folder is not None
            else open_evaluator(directory, present, store=store, model=answering, answers=answers)
        )
    console = Console(stderr=True)
    if questions is None:
        asked = _made_questions(evaluate.chunks(), answering, make, seed, directory, console)
    usable, left_out = answerable(asked, evaluate.chunks())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def heard(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        result = search_strategies(evaluate, usable, wanted, present, settings, heard)
    write_file(report.absolute(), page(result, len(left_out), answers).encode())
    write_file(recipe.absolute(), to_toml(result.recommended).encode())
    for name, held in result.held.items():
        typer.echo(f"{name:8}  quality {held.quality}  p95 {held.figures.p95 * 1000:.0f} ms")
    for comparison in result.comparisons:
        typer.echo(str(comparison))
    typer.echo(f"use {result.recommendation.name}: {result.recommendation.reason}")
    typer.echo(f"  {changes(result.recommended, present)}")
    left = f"; {len(left_out)} questions left out, their evidence is in no passage" if left_out else ""
    typer.echo(f"{recipe} (for --strategy), {report}{left}")


@rag.command("tuning-data")
def tuning_data(
    questions: Annotated[Path, typer.Option(help="As for `tune`; `tune` without --questions makes some.")],
    out: Annotated[Path, typer.Option(help="Where the samples go: JSON lines for `mainspring rl` (sft).")],
    kind: Annotated[
        str,
        typer.Option(
            help="dg: the relevant passage, dr: a random one, dgr: both, dgg: the relevant one twice."
        ),
    ] = "dgr",
    directory: _Index = Path(_INDEX_NAME),
    store: _Store = None,
    seed: Annotated[int, typer.Option(help="Of the random passages.")] = 0,
) -> None:
    """Write data to fine-tune the generator on, from the index and questions about it."""
    from typing import cast

    from mainspring.formats.files import write_file
    from mainspring.rag.assembly import open_pipeline
    from mainspring.rag.generation.tuning_data import ContextKind, tuning_rows
    from mainspring.rag.search.questions import load_questions

    asked = load_questions(questions)
    with _loading():
        parts = open_pipeline(directory, _loaded("fast"), store=store, citations=False).parts
    rows = tuning_rows(asked, parts.store.scan(), cast(ContextKind, kind), seed)
    lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n" for row in rows]
    write_file(out.absolute(), "".join(lines).encode())
    typer.echo(
        f"{len(rows)} samples in {out}; {len(asked) - len(rows)} questions have their evidence in no passage"
    )


def _made_questions(
    chunks: Iterator[Chunk],
    model: LanguageModel | None,
    count: int,
    seed: int,
    directory: Path,
    console: Console,
) -> tuple[TuneQuestion, ...]:
    """Questions by the model, kept in the index. Raises ConfigError without a model."""
    from mainspring.errors import ConfigError
    from mainspring.formats.files import write_file
    from mainspring.rag.ranking.cross_encoder import CrossEncoder
    from mainspring.rag.search.made_questions import make_questions

    if model is None:
        raise ConfigError("give --questions FILE, or --model to make some from the documents")
    columns = (TextColumn("Questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=count)
        heard = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        made = make_questions(chunks, model, CrossEncoder(), count, seed, heard)
    path = directory / "made_questions.jsonl"
    rows = [{"question": q.text, "evidence": list(q.evidence), "file": q.file} for q in made]
    write_file(path.absolute(), "".join(json.dumps(row) + "\n" for row in rows).encode())
    typer.echo(f"{len(made)} questions made, in {path}: look at them, and give them with --questions")
    return made


@rag.command()
def classify(
    directory: _Index = Path(_INDEX_NAME),
    questions: Annotated[
        Path | None,
        typer.Option(help="Questions as for `tune`, to test on as well: people's own, not made ones."),
    ] = None,
    store: _Store = None,
    seed: Annotated[int, typer.Option(help="Of the queries that are made.")] = 0,
) -> None:
    """Train what decides whether a question needs the documents, from the index's own sentences; print its test.

    It is kept in the index and used where a strategy's table `retrieve` says `classify = true`.
    """
    from mainspring.rag.assembly import open_pipeline
    from mainspring.rag.classification.classifier import train
    from mainspring.rag.classification.examples import make_examples
    from mainspring.rag.classification.testing import evaluate_classifier
    from mainspring.rag.search.questions import load_questions

    asked = [question.text for question in load_questions(questions)] if questions is not None else []
    with _loading():
        parts = open_pipeline(directory, _loaded("fast"), store=store, citations=False).parts
        training, test = make_examples(parts.store.scan(), seed=seed)
        classifier = train(training.needing, training.free, parts.embedder)
        classifier.save(directory)
        made = evaluate_classifier(classifier, parts.embedder, test.needing, test.free)
        own = evaluate_classifier(classifier, parts.embedder, asked, test.free) if asked else None
    typer.echo(f"held-out made queries: {made}")
    if own is not None:
        typer.echo(f"your questions:        {own}")


def _seconds(text: str) -> float:
    """Seconds of `800ms` or `1.5s`. Raises ConfigError."""
    from mainspring.errors import ConfigError

    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{text!r} is no duration above 0: write 800ms or 1.5s")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def _loaded(name: str) -> Strategy:
    from mainspring.rag.strategy import load_strategy

    return load_strategy(name)


def _loading() -> AbstractContextManager[object]:
    console = Console(stderr=True)
    return console.status("Loading the models") if console.is_terminal else nullcontext()
