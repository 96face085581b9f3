"""Which passage, and which words of it, support each statement of an answer: found afterwards, by the reranker.

Small models do not cite reliably, so that nobody asks them to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.chunking.sentences import sentence_spans
from mainspring.rag.documents.document import Place
from mainspring.rag.ranking.reranker import Reranker

MIN_SCORE = 0.0  # the cross-encoder's logit under which a passage does not support a statement


@dataclass(frozen=True)
class Citation:
    """Passage `number` supports the answer's characters [start, end).

    `quote` is the supporting sentence, `quote_start` its place in the text of the file's document.
    """

    number: int
    start: int
    end: int
    file: str
    place: Place
    quote: str
    quote_start: int
    score: float

    def __str__(self) -> str:
        return f"[{self.number}] {self.file}, {self.place}: {self.quote}"


def cited(pieces: Iterable[str], attributor: Attributor | None) -> Iterator[str | Citation]:
    """Text as it comes, each citation right behind its statement; white space at the very ends is left out.

    That a statement is finished shows when the next begins: white space is held back until then.
    """
    text = ""
    emitted = 0
    for piece in pieces:
        text = (text + piece).lstrip() if not text.strip() else text + piece
        for citation in attributor.push(text) if attributor is not None else ():
            if citation.end > emitted:
                yield text[emitted : citation.end]
                emitted = citation.end
            yield citation
        visible = len(text.rstrip())
        if visible > emitted:
            yield text[emitted:visible]
            emitted = visible
    yield from attributor.push(text, final=True) if attributor is not None else ()


class Attributor:
    """Attributes statements while an answer grows: each finished sentence once."""

    def __init__(self, chunks: Sequence[Chunk], reranker: Reranker, least: float = MIN_SCORE) -> None:
        self._chunks = chunks
        self._reranker = reranker
        self._least = least
        self._done = 0
        self._sentences = [sentence_spans(chunk.context) for chunk in chunks]

    def push(self, answer: str, final: bool = False) -> Iterator[Citation]:
        """The citations of sentences of `answer` that are finished since the last call (all of them if `final`)."""
        spans = sentence_spans(answer, self._done)
        for start, end in spans if final else spans[:-1]:
            self._done = end
            found = self._cite(answer[start:end], start, end)
            if found is not None:
                yield found

    def _cite(self, statement: str, start: int, end: int) -> Citation | None:
        """The best sentence among those of the best passage, None if it does not support the statement."""
        if not self._chunks:
            return None
        scores = self._reranker.scores(statement, [chunk.context for chunk in self._chunks])
        number = int(scores.argmax())
        if scores[number] < self._least or not self._sentences[number]:
            return None
        chunk = self._chunks[number]
        spans = self._sentences[number]
        texts = [chunk.context[first:last] for first, last in spans]
        best = int(self._reranker.scores(statement, texts).argmax())
        first, last = spans[best]
        return Citation(
            number=number + 1,
            start=start,
            end=end,
            file=chunk.file,
            place=chunk.place_in_context(first),
            quote=chunk.context[first:last],
            quote_start=chunk.context_start + first,
            score=float(scores[number]),
        )
