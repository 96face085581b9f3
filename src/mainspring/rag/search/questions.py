"""Questions with evidence, read from JSON lines: what a strategy must bring before the generator."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mainspring.errors import DocumentError
from mainspring.rag.chunking.chunk import Chunk

LEAST = 20  # questions on each side: a bootstrap over fewer says little


@dataclass(frozen=True)
class TuneQuestion:
    """A question, the texts of which a passage must hold one (white space and case aside), and where, if known."""

    text: str
    evidence: tuple[str, ...]
    file: str | None = None

    def found_in(self, text: str, file: str) -> bool:
        """Whether a text from a file answers it."""
        return self._found_in_plain(_plain(text), file)

    def _found_in_plain(self, plain: str, file: str) -> bool:
        return (self.file is None or self.file == file) and any(wanted in plain for wanted in self._wanted)

    @cached_property
    def _wanted(self) -> tuple[str, ...]:
        return tuple(_plain(text) for text in self.evidence)


def load_questions(path: Path) -> tuple[TuneQuestion, ...]:
    """One `{"question": ..., "evidence": [...], "file": ...}` a line; `file` may be absent, evidence one string.

    Raises DocumentError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"the questions {path} cannot be read: {error}") from error
    found = [_question(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    return tuple(dict.fromkeys(found))  # the same question on both sides of the split would leak


def answerable(
    questions: Sequence[TuneQuestion], chunks: Iterable[Chunk]
) -> tuple[tuple[TuneQuestion, ...], tuple[TuneQuestion, ...]]:
    """(those whose evidence stands in a chunk's context, the others): of the others no strategy finds anything."""
    open_ones = list(questions)
    for chunk in chunks:
        plain = _plain(chunk.context)
        open_ones = [q for q in open_ones if not q._found_in_plain(plain, chunk.file)]
    missing = set(open_ones)
    return tuple(q for q in questions if q not in missing), tuple(open_ones)


def split(
    questions: Sequence[TuneQuestion], held_out: float, seed: int
) -> tuple[tuple[TuneQuestion, ...], tuple[TuneQuestion, ...]]:
    """(to search on, held out), both in an order drawn by `seed`; questions of the same words stay together.

    Raises DocumentError if either side has fewer than LEAST.
    """
    groups: dict[str, list[TuneQuestion]] = {}
    for question in questions:
        groups.setdefault(_plain(question.text), []).append(question)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = round(len(questions) * held_out)
    searching: list[TuneQuestion] = []
    held: list[TuneQuestion] = []
    for group in order:
        (held if len(held) + len(group) <= wanted else searching).extend(group)
    if min(len(searching), len(held)) < LEAST:
        raise DocumentError(
            f"{len(questions)} questions give {len(searching)} to search on and {len(held)} held out; each side needs "
            f"{LEAST}: give more questions"
        )
    return tuple(searching), tuple(held)


def _question(line: str, where: str) -> TuneQuestion:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DocumentError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(text := row.get("question"), str) or not text.strip():
        raise DocumentError(f'{where} has no "question"')
    evidence = row.get("evidence")
    texts = [evidence] if isinstance(evidence, str) else evidence
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DocumentError(
            f'{where} has no "evidence": a text, or a list of texts, that answers the question'
        )
    file = row.get("file")
    if file is not None and not isinstance(file, str):
        raise DocumentError(f'{where}: "file" = {file!r} must be the name of an indexed file')
    return TuneQuestion(text.strip(), tuple(texts), file)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
