"""`mainspring rag tune` and `classify`: what is learnt from an index and questions about it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mainspring.cli.rag_options import INDEX_NAME, Index, Store, loaded, loading

if TYPE_CHECKING:
    from mainspring.rag.chunking.chunk import Chunk
    from mainspring.rag.generation.language_model import LanguageModel
    from mainspring.rag.search.questions import TuneQuestion


def tune(
    latency_p95: Annotated[str, typer.Option(help="What the p95 may be, without generation: 800ms or 1.5s.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines: {"question": ..., "evidence": ["a text of the passage"], "file": ...}. '
            "Without it --model makes some from the documents."
        ),
    ] = None,
    directory: Index = Path(INDEX_NAME),
    strategy: Annotated[
        str, typer.Option(help="The present strategy: where to start, what to beat.")
    ] = "default",
    space: Annotated[
        Path | None, typer.Option(help="A TOML file with a list of values for each setting.")
    ] = None,
    budget: Annotated[
        int, typer.Option(min=1, help="Evaluations (strategy x question) of each search.")
    ] = 2000,
    finalists: Annotated[
        int, typer.Option(min=1, help="Strategies of the beam that successive halving tells apart.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Of the split, and of the strategies drawn at random.")] = 0,
    store: Store = None,
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

    Searches whole strategies (a beam over what a screening of the space taught, then successive halving) and module by
    module with as many evaluations. Nothing
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

    settings = TuneSettings(_seconds(latency_p95), budget, finalists, seed=seed)
    asked, present = load_questions(questions) if questions is not None else (), loaded(strategy)
    if space is not None:
        wanted = load_space(space, with_index=folder is not None)
    else:
        wanted = default_space(model is not None, folder is not None, answers)
    with loading():
        answering = open_model(model, at_once=8) if model is not None else None
        evaluate = (
            open_variants(directory, folder, present, model=answering, answers=answers)
            if folder is not None
            else open_evaluator(directory, present, store=store, model=answering, answers=answers)
        )
    console = Console(stderr=True)
    if questions is None:
        asked = made_questions(evaluate.chunks(), answering, make, seed, directory, console)
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


def made_questions(
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

        def heard(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        made = make_questions(chunks, model, CrossEncoder(), count, seed, heard)
    path = directory / "made_questions.jsonl"
    rows = [{"question": q.text, "evidence": list(q.evidence), "file": q.file} for q in made]
    write_file(path.absolute(), "".join(json.dumps(row) + "\n" for row in rows).encode())
    typer.echo(f"{len(made)} questions made, in {path}: look at them, and give them with --questions")
    return made


def classify(
    directory: Index = Path(INDEX_NAME),
    questions: Annotated[
        Path | None,
        typer.Option(help="Questions as for `tune`, to test on as well: people's own, not made ones."),
    ] = None,
    store: Store = None,
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
    with loading():
        parts = open_pipeline(directory, loaded("fast"), store=store, citations=False).parts
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
