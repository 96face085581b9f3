"""What a file becomes: its text, and where in the file each part of the text stands."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

Unit = Literal["line", "page", "paragraph", "cell"]


@dataclass(frozen=True)
class Place:
    """A place that a person can go to: line, page, paragraph or notebook cell, counted from 1."""

    unit: Unit
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


@dataclass(frozen=True)
class Mark:
    """From `offset` in a document's text on, one is at `place`, until the next mark."""

    offset: int
    place: Place


@dataclass(frozen=True)
class Section:
    """A stretch of a document's text under a path of headings, the outermost first (a function under its class)."""

    start: int
    end: int
    headings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A file's text. `marks` are sorted by offset; without any, places are the text's own lines.

    `sections` lie end to end and cover the whole text. `content_hash` is that of the file's bytes.
    """

    path: str
    content_hash: str
    text: str
    title: str
    sections: tuple[Section, ...]
    marks: tuple[Mark, ...] = ()

    def place(self, offset: int) -> Place:
        """Where the character at `offset` stands in the file."""
        if not self.marks:
            return Place("line", bisect.bisect_right(self._line_starts, offset))
        index = bisect.bisect_right(self._mark_offsets, offset) - 1
        return self.marks[max(index, 0)].place

    def place_borders(self, start: int, end: int) -> list[int]:
        """The offsets in (start, end) at which a new place begins."""
        borders = self._mark_offsets if self.marks else self._line_starts
        return borders[bisect.bisect_right(borders, start) : bisect.bisect_left(borders, end)]

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(i + 1 for i, character in enumerate(self.text) if character == "\n")]

    @cached_property
    def _mark_offsets(self) -> list[int]:
        return [mark.offset for mark in self.marks]


class Reader(Protocol):
    """Reads one format. Raises DocumentError for a file that is not what its name says."""

    def __call__(self, path: Path, data: bytes) -> Extract: ...


@dataclass(frozen=True)
class Extract:
    """What a reader finds in a file: text, places, and (offset, level, title) of every heading, in order."""

    text: str
    headings: Sequence[tuple[int, int, str]] = ()
    marks: Sequence[Mark] = ()
    title: str | None = None


def document(path: str, data: bytes, extract: Extract) -> Document:
    """The document of a file at `path` (as shown to people) with these bytes."""
    sections = tuple(_sections(extract.text, extract.headings))
    title = extract.title or next((t for _, level, t in extract.headings if level == 1), None)
    return Document(
        path=path,
        content_hash=hashlib.sha256(data).hexdigest(),
        text=extract.text,
        title=title or Path(path).stem,
        sections=sections,
        marks=tuple(extract.marks),
    )


def _sections(text: str, headings: Sequence[tuple[int, int, str]]) -> list[Section]:
    """Cuts the text before each heading; a heading's path holds those of lower level above it."""
    sections: list[Section] = []
    path: list[tuple[int, str]] = []
    start = 0
    for offset, level, title in headings:
        if offset > start:
            sections.append(Section(start, offset, tuple(t for _, t in path)))
        path = [(above, t) for above, t in path if above < level]
        path.append((level, title))
        start = offset
    if len(text) > start or not sections:
        sections.append(Section(start, len(text), tuple(t for _, t in path)))
    return sections
