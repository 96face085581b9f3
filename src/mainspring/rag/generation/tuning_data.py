"""Data to fine-tune the generator on: question, context, answer, with contexts that help, that do not, and both.

The four kinds of the paper (arXiv 2407.01219, section 3.7). It finds that a generator trained on one relevant and one
random passage (Dgr) holds out best against passages that have nothing to do with the question.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mainspring.errors import ConfigError, DocumentError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.generation.prompts import answer_prompt
from mainspring.rag.search.questions import TuneQuestion

ContextKind = Literal["dg", "dr", "dgr", "dgg"]
CONTEXT_KINDS: tuple[ContextKind, ...] = get_args(ContextKind)


@dataclass(frozen=True)
class TuningRow:
    """One sample: what the model reads, as `Pipeline.ask` would put it, and what it is to say."""

    prompt: str
    answer: str


def tuning_rows(
    questions: Sequence[TuneQuestion], chunks: Iterable[Chunk], kind: ContextKind, seed: int = 0
) -> list[TuningRow]:
    """One row for each question whose evidence stands in a chunk; the answer is its first evidence.

    dg: the relevant passage. dr: a random one. dgr: both, in random order. dgg: the relevant one twice.
    Random passages hold no evidence of the question. Raises DocumentError if the corpus is too small to draw one from,
    ConfigError for another kind.
    """
    if kind not in CONTEXT_KINDS:
        raise ConfigError(f"the context {kind!r} must be one of {', '.join(CONTEXT_KINDS)}")
    everything = list(chunks)
    generator = random.Random(seed)
    rows: list[TuningRow] = []
    for question in questions:
        relevant = [c for c in everything if question.found_in(c.context, c.file)]
        if not relevant:
            continue
        others = [c for c in everything if not any(e in c.context for e in question.evidence)]
        if kind in ("dr", "dgr") and not others:
            raise DocumentError("every passage holds the evidence: there is no other one to draw")
        gold = relevant[0]
        if kind == "dr":
            context = [generator.choice(others)]
        elif kind == "dgr":
            context = generator.sample([gold, generator.choice(others)], 2)
        else:
            context = [gold] * len(kind[1:])
        messages = answer_prompt(question.text, [c.context for c in context], [_source(c) for c in context])
        rows.append(TuningRow("\n\n".join(m.content for m in messages), question.evidence[0]))
    return rows


def _source(chunk: Chunk) -> str:
    return f"{chunk.file}, {chunk.place}"
