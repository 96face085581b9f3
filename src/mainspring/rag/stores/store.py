"""The protocol of a vector store: chunks with their vectors, replaced file by file, found by vector and filter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from mainspring.errors import ConfigError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.documents.document import Place, Unit
from mainspring.rag.embedding.embedder import Vectors

Field = Literal["file", "kind", "title"]
FIELDS: tuple[Field, ...] = ("file", "kind", "title")


@dataclass(frozen=True)
class Condition:
    """`field` equals `value`, or begins with it. The kind of a chunk is its file's suffix without the dot."""

    field: Field
    value: str
    prefix: bool = False

    def holds(self, chunk: Chunk) -> bool:
        """Whether a chunk fulfils it."""
        value = {"file": chunk.file, "kind": kind_of(chunk.file), "title": chunk.title}[self.field]
        return value.startswith(self.value) if self.prefix else value == self.value

    @staticmethod
    def parse(text: str) -> Condition:
        """`kind=md` or `file^=docs/` (begins with). Raises ConfigError."""
        name, separator, value = text.partition("=")
        prefix = name.endswith("^")
        name = name.removesuffix("^").strip()
        if not separator or name not in FIELDS:
            raise ConfigError(
                f"{text!r} is no filter: write FIELD=VALUE or FIELD^=START with one of {', '.join(FIELDS)}"
            )
        return Condition(name, value, prefix)


Filter = Sequence[Condition]  # all of them must hold


@dataclass(frozen=True)
class Hit:
    """A chunk's id and its cosine to the vector that was asked for."""

    id: str
    score: float


class VectorStore(Protocol):
    """Chunks and their unit vectors.

    One process writes at a time, any number read meanwhile; a reader sees each `replace` wholly or not at all, except
    where a store says that it cannot promise it. What `replace` has returned from survives the process. Methods raise
    StoreError for a store that is damaged or out of reach.
    """

    def replace(self, files: Sequence[str], chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """Makes `chunks` (all of these files) with `vectors` [N, D] all that the store holds of `files`."""
        ...

    def files(self) -> Mapping[str, str]:
        """Name -> content hash of every file that has a chunk here."""
        ...

    def count(self) -> int:
        """How many chunks there are."""
        ...

    def version(self) -> str:
        """Changes whenever the contents do."""
        ...

    def search(self, vector: npt.NDArray[np.float32], k: int, where: Filter = ()) -> list[Hit]:
        """The k chunks nearest to a unit vector [D], the nearest first."""
        ...

    def get(self, ids: Sequence[str]) -> list[Chunk]:
        """The chunks of these ids in their order; ids that are gone (a writer is at it) are left out."""
        ...

    def scan(self) -> Iterator[Chunk]:
        """Every chunk, in one order for one version."""
        ...

    def optimise(self) -> None:
        """Tidies up after many writes and brings search structures up to date."""
        ...

    def close(self) -> None: ...


class TextStore(Protocol):
    """A store that finds chunks by words as well, with an index of its own."""

    def prepare_text(self) -> None:
        """Builds that index where it is not there; only strategies that search by it want it built."""
        ...

    def search_text(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks by BM25; chunks that share no word with the query are none of them."""
        ...


def kind_of(file: str) -> str:
    """A file's suffix without the dot, in lower case."""
    return PurePosixPath(file).suffix.lower().removeprefix(".")


def row_of(chunk: Chunk) -> dict[str, str | int]:
    """A chunk as columns."""
    return {
        "id": chunk.id,
        "file": chunk.file,
        "kind": kind_of(chunk.file),
        "content_hash": chunk.content_hash,
        "title": chunk.title,
        "first": chunk.start,
        "last": chunk.end,
        "text": chunk.text,
        "header": chunk.header,
        "context": "" if chunk.context == chunk.text else chunk.context,
        "context_first": chunk.context_start,
        "unit": chunk.places[0][1].unit,
        "places": " ".join(f"{offset}:{place.number}" for offset, place in chunk.places),
        "tokens": chunk.tokens,
    }


COLUMNS = (
    "id", "file", "content_hash", "title", "first", "last", "text", "header", "context", "context_first", "unit",
    "places", "tokens",
)  # fmt: skip


def chunk_of(row: Mapping[str, object]) -> Chunk:
    """The chunk of a row that `row_of` made."""
    text = str(row["text"])
    return Chunk(
        id=str(row["id"]),
        file=str(row["file"]),
        content_hash=str(row["content_hash"]),
        title=str(row["title"]),
        start=_integer(row["first"]),
        end=_integer(row["last"]),
        text=text,
        header=str(row["header"]),
        context=str(row["context"]) or text,
        context_start=_integer(row["context_first"]),
        places=_places(cast(Unit, str(row["unit"])), str(row["places"])),
        tokens=_integer(row["tokens"]),
    )


def _places(unit: Unit, text: str) -> tuple[tuple[int, Place], ...]:
    pairs = (item.split(":") for item in text.split(" "))
    return tuple((int(offset), Place(unit, int(number))) for offset, number in pairs)


def _integer(value: object) -> int:
    assert isinstance(value, int)  # stores give back the integers that `row_of` gave them
    return value
