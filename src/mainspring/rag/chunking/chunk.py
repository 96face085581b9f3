"""A chunk: a stretch of a document that is embedded and found, and the protocol of what cuts documents into them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mainspring.rag.documents.document import Document, Place


@dataclass(frozen=True)
class Chunk:
    """`text` is document.text[start:end]; what the generator reads is the wider `context` (the same, mostly).

    `header` (title and headings) goes before the text where it is embedded and indexed, and is never cited.
    `places` says where in the file the context stands: (offset in it, place), from 0 on, wherever the place changes.
    `tokens` are counted by the embedding model's tokenizer, header and special tokens included.
    """

    id: str
    file: str
    content_hash: str
    title: str
    start: int
    end: int
    text: str
    header: str
    context: str
    context_start: int
    places: tuple[tuple[int, Place], ...]
    tokens: int

    @property
    def place(self) -> Place:
        """Where the text begins in the file."""
        return self.place_in_context(self.start - self.context_start)

    def place_in_context(self, offset: int) -> Place:
        """Where the character at `offset` of the context stands in the file."""
        return max((p for p in self.places if p[0] <= offset), key=lambda p: p[0], default=self.places[0])[1]

    @property
    def indexed_text(self) -> str:
        """What is embedded and searched: the header, then the text."""
        return f"{self.header}\n{self.text}" if self.header else self.text


class TokenCounter(Protocol):
    """Counts tokens as the embedding model will, and knows how many it takes."""

    @property
    def window(self) -> int: ...

    def count(self, text: str) -> int:
        """Tokens of a text, special ones included."""
        ...

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        """(start, end) in characters of every token of the text, special ones left out."""
        ...


class Chunker(Protocol):
    """Cuts a document into chunks whose indexed texts fit the counter's window."""

    @property
    def name(self) -> str:
        """Names the way of cutting with all its settings: an index made in another way is not mixed with it."""
        ...

    def split(self, document: Document, counter: TokenCounter) -> list[Chunk]: ...


def make_chunk(
    document: Document,
    start: int,
    end: int,
    counter: TokenCounter,
    *,
    header: str = "",
    context: tuple[int, int] | None = None,
) -> Chunk:
    """The chunk document.text[start:end]; `context` is the wider stretch that the generator reads."""
    text = document.text[start:end]
    context_start, context_end = context or (start, end)
    digest = hashlib.sha256(f"{document.path}\0{document.content_hash}\0{start}\0{end}".encode())
    indexed = f"{header}\n{text}" if header else text
    return Chunk(
        id=digest.hexdigest()[:24],
        file=document.path,
        content_hash=document.content_hash,
        title=document.title,
        start=start,
        end=end,
        text=text,
        header=header,
        context=document.text[context_start:context_end],
        context_start=context_start,
        places=_places(document, context_start, context_end),
        tokens=counter.count(indexed),
    )


def _places(document: Document, start: int, end: int) -> tuple[tuple[int, Place], ...]:
    """(offset from start, place) at the start and wherever the place changes before the end."""
    found = [(0, document.place(start))]
    for offset in document.place_borders(start, end):
        place = document.place(offset)
        if place != found[-1][1]:
            found.append((offset - start, place))
    return tuple(found)
