"""`mainspring rag tuning-data` and `fine-tune`: the generator learns which passages to answer from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from mainspring.cli.rag_options import INDEX_NAME, Index, Store, loaded, loading

if TYPE_CHECKING:
    from mainspring.rag.generation.language_model import InProcessModel
    from mainspring.rag.generation.robustness import Scores
    from mainspring.rag.generation.tuning_data import ContextKind, TuningRow
    from mainspring.rl.recipe import RlRecipe

UNTRAINED = "untrained"
_ANSWER_TOKENS = 96
_AT_ONCE = {"cpu": 8, "cuda": 256}  # answers that are written side by side
_CACHE_BYTES = {"cpu": None, "cuda": 6 << 30}  # one model after another finds room
_MICROBATCH = {"cpu": 2048, "cuda": 16384}  # tokens; more if one sample is longer


def tuning_data(
    out: Annotated[Path, typer.Option(help="A folder for the samples, to be given to `fine-tune`.")],
    questions: Annotated[
        Path | None, typer.Option(help="As for `tune`; without it --model makes some from the documents.")
    ] = None,
    directory: Index = Path(INDEX_NAME),
    store: Store = None,
    model: Annotated[str | None, typer.Option(help="Who makes the questions.")] = None,
    make: Annotated[int, typer.Option(min=40, help="How many questions are made without --questions.")] = 400,
    held_out: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Share of the questions to test with.")
    ] = 0.25,
    seed: Annotated[int, typer.Option(help="Of the split and the random passages.")] = 0,
) -> None:
    """Write data to fine-tune the generator on, from the index and questions about it.

    Files train.KIND.jsonl and held_out.KIND.jsonl for each kind of context: dg, the relevant passage; dr, a random one;
    dgr, both; dgg, the relevant one twice. The answer is the question's first evidence.
    """
    from mainspring.cli.rag_learn import made_questions
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.generation.tuning_data import CONTEXT_KINDS, save_rows, tuning_rows
    from mainspring.rag.search.questions import answerable, load_questions, split

    asked = load_questions(questions) if questions is not None else ()
    with loading():
        parts = open_pipeline(directory, loaded("fast"), store=store, citations=False).parts
        answering = open_model(model, at_once=_AT_ONCE["cpu"]) if model is not None else None
    chunks = list(parts.store.scan())
    if questions is None:
        asked = made_questions(iter(chunks), answering, make, seed, directory, Console(stderr=True))
    usable, left_out = answerable(asked, chunks)
    train, held = split(usable, held_out, seed)
    out.mkdir(parents=True, exist_ok=True)
    for kind in CONTEXT_KINDS:
        save_rows(out / f"train.{kind}.jsonl", tuning_rows(train, chunks, kind, seed))
        save_rows(out / f"held_out.{kind}.jsonl", tuning_rows(held, chunks, kind, seed))
    typer.echo(
        f"{len(train)} samples to learn and {len(held)} to test with in {out}; "
        f"{len(left_out)} questions have their evidence in no passage"
    )


def fine_tune(
    data: Annotated[Path, typer.Argument(help="The folder that `tuning-data` wrote.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Contexts to learn with: dg, dr, dgr, dgg; repeat it to compare several (none: dgr)."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="The model to tune: smollm2, a Hugging Face directory, a GGUF file.")
    ] = "smollm2",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the samples.")] = 2.0,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-5,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 16,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Train adapters of this rank; 0: the weights themselves.")
    ] = 0,
    test: Annotated[
        list[Path] | None, typer.Option(help="More folders whose held_out files are tested on.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Held-out questions that are asked, of each folder.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of the samples' order, and of adapters.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what a former run has left.")] = False,
) -> None:
    """Fine-tune the generator on question, passages and answer, and measure how irrelevant passages mislead it.

    Each kind's model lies in DATA/KIND/latest, for `rag ask --model` and `mainspring serve`. Ctrl-C writes a
    checkpoint; the same command goes on from there. Held-out questions are answered by the model as it was and by each
    tuned one, from the relevant passage, from it and a random one, and from a random one alone: DATA/report.md.
    """
    from mainspring.errors import ConfigError
    from mainspring.formats.files import write_file
    from mainspring.rag.generation.robustness import costs_of_noise, table
    from mainspring.rag.generation.tuning_data import CONTEXT_KINDS

    kinds = list(dict.fromkeys(kind or ["dgr"]))
    if unknown := [name for name in kinds if name not in CONTEXT_KINDS]:
        raise ConfigError(f"the context {unknown[0]!r} must be one of {', '.join(CONTEXT_KINDS)}")
    if device not in _AT_ONCE:
        raise ConfigError(f"device {device!r} must be one of {', '.join(_AT_ONCE)}")
    models = {
        UNTRAINED: _Tuned(model, f"{model}, as served"),
        f"{UNTRAINED}, free to repeat": _Tuned(model, f"{model}, no penalty", repetition_penalty=1.0),
    }
    for name in kinds:
        settings = _Settings(model, device, epochs, learning_rate, batch, lora_rank, seed)
        tuned = _train(data, cast("ContextKind", name), settings, restart)
        if tuned is None:
            raise typer.Exit(130)  # as a shell reports after Ctrl-C
        models[name] = tuned
    lines = [f"# Fine-tuned generators: {data}"]
    for folder in (data, *(test or ())):
        scores = _measure(folder, data / "answers", models, device, limit)
        count = len(next(iter(scores[UNTRAINED].values())).f1)
        lines += [
            "",
            f"{folder}: {count} held-out questions",
            "",
            *table(scores),
            "",
            *costs_of_noise(scores),
        ]
    write_file((data / "report.md").absolute(), ("\n".join(lines) + "\n").encode())
    typer.echo("\n".join(lines))


@dataclass(frozen=True)
class _Settings:
    model: str
    device: str
    epochs: float
    learning_rate: float
    batch: int
    lora_rank: int
    seed: int


@dataclass(frozen=True)
class _Tuned:
    """Where a model lies, what identifies it (how it was made), and another penalty than its own on repeating."""

    path: str
    made: str
    repetition_penalty: float | None = None


def _train(data: Path, kind: ContextKind, settings: _Settings, restart: bool) -> _Tuned | None:
    """The tuned model, trained or found; None if training was interrupted. Raises ConfigError for other settings."""
    from mainspring.errors import ConfigError
    from mainspring.formats.files import write_file, write_json
    from mainspring.formats.named_models import resolve
    from mainspring.formats.tokenizer import Tokenizer
    from mainspring.rag.generation.tuning_data import load_rows
    from mainspring.rl.run import RlRun

    rows = load_rows(data / f"train.{kind}.jsonl")
    tokenizer = Tokenizer.from_directory(resolve(settings.model).path)
    prompts = [tokenizer.apply_chat_template([vars(m) for m in row.messages]) for row in rows]
    texts = [{"prompt": p, "answer": row.answers[0]} for p, row in zip(prompts, rows, strict=True)]
    lines = "".join(json.dumps(text) + "\n" for text in texts).encode()
    folder = data / kind
    made = {**vars(settings), "samples": hashlib.sha256(lines).hexdigest()}
    del made["device"]  # a run may go on elsewhere
    if restart and folder.exists():
        shutil.rmtree(folder)
    known = folder / "settings.json"
    if known.is_file() and json.loads(known.read_bytes()) != made:
        raise ConfigError(
            f"{folder} was trained with other settings or samples: keep them, or give --restart"
        )
    tuned = _Tuned(str(folder / "latest"), json.dumps(made, sort_keys=True))
    if (folder / "done").is_file():
        return tuned
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "samples.jsonl", lines)
    write_json(known, made)
    longest = max(
        len(tokenizer.encode(t["prompt"], add_special_tokens=False)) + len(tokenizer.encode(t["answer"])) + 2
        for t in texts
    )
    recipe = _recipe(folder, settings, len(rows), longest)
    result = RlRun(recipe, resume=(folder / "latest").exists()).run()
    # It learns to say what stands in its passages: the penalty that keeps small models from loops would forbid it.
    write_json(result.checkpoint / "generation_config.json", _generation_config(result.checkpoint))
    if result.interrupted:
        return None
    write_file(folder / "done", b"")
    return tuned


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    stored = json.loads(path.read_bytes()) if path.is_file() else {}
    return {**stored, "repetition_penalty": 1.0}


def _recipe(folder: Path, settings: _Settings, samples: int, longest: int) -> RlRecipe:
    from mainspring.rl.lora import LoraSettings
    from mainspring.rl.recipe import DataSection, ModelSection, RlRecipe
    from mainspring.rl.sft import SftSettings
    from mainspring.train.recipe import CheckpointSection, OptimizerSection, ScheduleSection

    batch = min(settings.batch, samples)
    steps = max(1, round(settings.epochs * samples / batch))
    on_gpu = settings.device == "cuda"
    return RlRecipe(
        algorithm="sft",
        name=folder.name,
        output=str(folder),
        model=ModelSection(path=settings.model, device="cuda" if on_gpu else "cpu"),
        data=DataSection(train=str(folder / "samples.jsonl")),
        lora=LoraSettings(rank=settings.lora_rank, seed=settings.seed),
        optimizer=OptimizerSection(lr=settings.learning_rate, weight_decay=0.0),
        sft=SftSettings(
            prompts_per_step=batch,
            tokens_per_microbatch=max(_MICROBATCH[settings.device], longest),
            max_steps=steps,
            schedule=ScheduleSection(kind="cosine", warmup_fraction=0.1),
            seed=settings.seed,
        ),
        checkpoint=CheckpointSection(every=max(20, steps // 5), keep=1),
    )


def _measure(
    folder: Path, answers: Path, models: dict[str, _Tuned], device: str, limit: int
) -> dict[str, dict[ContextKind, Scores]]:
    """The scores of every model in every context on a folder's held-out questions; answers that are kept count."""
    from mainspring.formats.files import write_json
    from mainspring.rag.generation.language_model import InProcessModel
    from mainspring.rag.generation.robustness import CONTEXTS, score
    from mainspring.rag.generation.tuning_data import load_rows

    found: dict[str, dict[ContextKind, Scores]] = {}
    for name, tuned in models.items():
        model: InProcessModel | None = None
        found[name] = {}
        for kind in CONTEXTS:
            rows = load_rows(folder / f"held_out.{kind}.jsonl")[:limit]
            key = hashlib.sha256(repr((tuned.made, rows, _ANSWER_TOKENS)).encode()).hexdigest()[:24]
            path = answers / f"{key}.json"
            if not path.is_file():
                if model is None:
                    model = InProcessModel(
                        tuned.path,
                        at_once=_AT_ONCE[device],
                        device=device,
                        repetition_penalty=tuned.repetition_penalty,
                        kv_cache_bytes=_CACHE_BYTES[device],
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, _answers(model, rows, f"{folder.name}, {name}, {CONTEXTS[kind]}"))
            found[name][kind] = score(json.loads(path.read_bytes()), rows)
    return found


def _answers(model: InProcessModel, rows: Sequence[TuningRow], what: str) -> list[str]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    written: list[str] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(rows))
        for first in range(0, len(rows), model.at_once):
            block = rows[first : first + model.at_once]
            written += model.complete_each([row.messages for row in block], _ANSWER_TOKENS)
            bar.advance(task, len(block))
    return written
