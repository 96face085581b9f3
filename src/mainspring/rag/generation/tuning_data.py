"""Data to fine-tune the generator on, and to test it with: question, context, answer, with contexts that help or not.

The four kinds of the paper (arXiv 2407.01219, section 3.7). It finds that a generator trained on one relevant and one
random passage (Dgr) holds out best against passages that have nothing to do with the question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from mainspring.errors import ConfigError, DocumentError
from mainspring.formats.files import write_file
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.generation.language_model import Message
from mainspring.rag.generation.prompts import answer_prompt
from mainspring.rag.search.questions import TuneQuestion

ContextKind = Literal["dg", "dr", "dgr", "dgg"]
CONTEXT_KINDS: tuple[ContextKind, ...] = get_args(ContextKind)
_DRAWS = 64  # random passages that are tried before all are looked through


@dataclass(frozen=True)
class TuningRow:
    """One sample: what the model reads, as `Pipeline.ask` puts it, and the accepted answers; it learns the first."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...]


def tuning_rows(
    questions: Sequence[TuneQuestion], chunks: Iterable[Chunk], kind: ContextKind, seed: int = 0
) -> list[TuningRow]:
    """One row for each question whose evidence stands in a chunk; its evidence is the answer.

    dg: the relevant passage. dr: a random one. dgr: both, in random order. dgg: the relevant one twice.
    Random passages hold no evidence of the question, and depend on the question and the seed alone. Raises
    DocumentError if the corpus is too small to draw one from, ConfigError for another kind.
    """
    if kind not in CONTEXT_KINDS:
        raise ConfigError(f"the context {kind!r} must be one of {', '.join(CONTEXT_KINDS)}")
    everything = list(chunks)
    by_file: dict[str, list[Chunk]] = {}
    for chunk in everything:
        by_file.setdefault(chunk.file, []).append(chunk)
    rows: list[TuningRow] = []
    for question in questions:
        near = everything if question.file is None else by_file.get(question.file, [])
        gold = next((c for c in near if question.found_in(c.context, c.file)), None)
        if gold is None:
            continue
        generator = random.Random(f"{seed} {question.text}")
        if kind == "dr":
            context = [_other(question, everything, generator)]
        elif kind == "dgr":
            context = generator.sample([gold, _other(question, everything, generator)], 2)
        else:
            context = [gold] * len(kind[1:])
        messages = answer_prompt(question.text, [c.context for c in context], [_source(c) for c in context])
        rows.append(TuningRow(tuple(messages), question.evidence))
    return rows


def save_rows(path: Path, rows: Sequence[TuningRow]) -> None:
    """Writes JSON lines, the file whole or not at all."""
    write_file(path.absolute(), "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode())


def load_rows(path: Path) -> list[TuningRow]:
    """What `save_rows` wrote. Raises DocumentError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"the samples {path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            messages = tuple(Message(m["role"], m["content"]) for m in fields["messages"])
            rows.append(TuningRow(messages, tuple(fields["answers"])))
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(
                f"{path}, line {number} is not a sample of `rag tuning-data`: {error!r}"
            ) from error
    if not rows:
        raise DocumentError(f"{path} holds no samples")
    return rows


def _other(question: TuneQuestion, chunks: Sequence[Chunk], generator: random.Random) -> Chunk:
    """A random chunk that holds none of the question's evidence, whatever its file."""
    anywhere = TuneQuestion(question.text, question.evidence)
    for _ in range(_DRAWS):
        drawn = generator.choice(chunks)
        if not anywhere.found_in(drawn.context, drawn.file):
            return drawn
    others = [c for c in chunks if not anywhere.found_in(c.context, c.file)]
    if not others:
        raise DocumentError("every passage holds the evidence: there is no other one to draw")
    return generator.choice(others)


def _source(chunk: Chunk) -> str:
    return f"{chunk.file}, {chunk.place}"
