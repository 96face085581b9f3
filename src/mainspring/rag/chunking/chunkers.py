"""The ways of cutting documents (arXiv 2407.01219, section 3.2): sizes, sentences, small-to-big, sliding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mainspring.rag.chunking.chunk import Chunk, TokenCounter, make_chunk
from mainspring.rag.chunking.windows import Span, TokenMap, check_sizes, sentence_windows, token_windows
from mainspring.rag.documents.document import Document, Section

Border = Literal["token", "sentence"]
_MAX_HEADER_SHARE = 4  # a header may take a quarter of the window


@dataclass(frozen=True)
class SplitChunker:
    """Pieces of `size` tokens of the document's sections, cut at tokens or at ends of sentences.

    `headers` puts the document's title and the section's headings before what is embedded (contextual headers).
    Neighbouring sections that fit one piece together share it, so that a page of short sections is no heap of
    one-line chunks; a section's own border is otherwise never crossed.
    """

    size: int = 200
    overlap: int = 20
    border: Border = "sentence"
    headers: bool = True

    def __post_init__(self) -> None:
        check_sizes(self.size, self.overlap)

    @property
    def name(self) -> str:
        return f"split-{self.border}-{self.size}-{self.overlap}{'-headers' if self.headers else ''}"

    def split(self, document: Document, counter: TokenCounter) -> list[Chunk]:
        chunks = []
        tokens = TokenMap(counter.spans(document.text))
        for section, header in _grouped(document, self.size, self.headers, tokens, counter):
            cut = (self.size, self.overlap, self.border)
            for start, end in _spans(document.text, section, header, *cut, tokens, counter):
                chunks.append(make_chunk(document, start, end, counter, header=header))
        return chunks


@dataclass(frozen=True)
class SmallToBigChunker:
    """Small pieces are embedded and found, the bigger piece around each is what the generator reads."""

    size: int = 64
    big_size: int = 256
    headers: bool = True

    def __post_init__(self) -> None:
        check_sizes(self.size, 0)
        check_sizes(self.big_size, self.size)

    @property
    def name(self) -> str:
        return f"small-to-big-{self.size}-{self.big_size}{'-headers' if self.headers else ''}"

    def split(self, document: Document, counter: TokenCounter) -> list[Chunk]:
        chunks = []
        text, tokens = document.text, TokenMap(counter.spans(document.text))
        for section, header in _grouped(document, self.big_size, self.headers, tokens, counter):
            for big in sentence_windows(text, section.start, section.end, self.big_size, 0, tokens):
                small = Section(*big)
                for start, end in _spans(text, small, header, self.size, 0, "sentence", tokens, counter):
                    chunks.append(make_chunk(document, start, end, counter, header=header, context=big))
        return chunks


@dataclass(frozen=True)
class SlidingWindowChunker:
    """Pieces of `size` tokens, each read together with its neighbours of `window` pieces before and after."""

    size: int = 64
    window: int = 1
    headers: bool = True

    def __post_init__(self) -> None:
        check_sizes(self.size, 0)
        check_sizes(8 + self.window, 0)

    @property
    def name(self) -> str:
        return f"sliding-{self.size}-{self.window}{'-headers' if self.headers else ''}"

    def split(self, document: Document, counter: TokenCounter) -> list[Chunk]:
        chunks = []
        tokens = TokenMap(counter.spans(document.text))
        for section, header in _grouped(document, self.size, self.headers, tokens, counter):
            spans = _spans(document.text, section, header, self.size, 0, "sentence", tokens, counter)
            for i, (start, end) in enumerate(spans):
                context = (spans[max(i - self.window, 0)][0], spans[min(i + self.window, len(spans) - 1)][1])
                chunks.append(make_chunk(document, start, end, counter, header=header, context=context))
        return chunks


def _spans(
    text: str,
    section: Section,
    header: str,
    size: int,
    overlap: int,
    border: Border,
    tokens: TokenMap,
    counter: TokenCounter,
) -> list[Span]:
    """Pieces of at most `size` tokens that fit the embedding model's window together with the header."""
    room = counter.window - counter.count(header)
    size = min(size, room)
    cut = sentence_windows if border == "sentence" else token_windows
    spans = cut(text, section.start, section.end, size, min(overlap, size - 1), tokens)
    # A text's tokens are not always those of its parts: what came out too long is halved until it fits.
    return [fitting for span in spans for fitting in _fitting(text, span, room, counter)]


def _fitting(text: str, span: Span, room: int, counter: TokenCounter) -> list[Span]:
    tokens = counter.spans(text[span[0] : span[1]])
    if len(tokens) <= room or len(tokens) < 2:
        return [span]
    middle = span[0] + tokens[len(tokens) // 2][0]
    return [
        *_fitting(text, (span[0], middle), room, counter),
        *_fitting(text, (middle, span[1]), room, counter),
    ]


def _grouped(
    document: Document, size: int, headers: bool, tokens_of: TokenMap, counter: TokenCounter
) -> Iterator[tuple[Section, str]]:
    """(section, header) with short neighbours joined; joined ones keep the headings that they have in common."""
    held: Section | None = None
    held_tokens = 0
    for section in document.sections:
        tokens = len(tokens_of.between(section.start, section.end))
        if held is not None and held_tokens + tokens <= size:
            held = Section(held.start, section.end, _common(held.headings, section.headings))
            held_tokens += tokens
            continue
        if held is not None:
            yield held, _header(document, held, headers, counter)
        held, held_tokens = section, tokens
    if held is not None:
        yield held, _header(document, held, headers, counter)


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return first[:count]


def _header(document: Document, section: Section, headers: bool, counter: TokenCounter) -> str:
    """Title and headings, the outer ones left out first where they take more than their share of the window."""
    if not headers:
        return ""
    parts = [document.title, *(h for h in section.headings if h != document.title)]
    while parts:
        header = " > ".join(parts)
        if counter.count(header) <= counter.window // _MAX_HEADER_SHARE:
            return header
        parts = parts[1:]
    return ""
