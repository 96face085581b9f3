"""Search by words over a store's chunks: by postings of our own, built once for a version, or by the store's index."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from mainspring.errors import ConfigError
from mainspring.formats.files import new_directory, write_json
from mainspring.rag.retrieval.bm25 import Bm25Index
from mainspring.rag.stores.field_columns import FieldColumns
from mainspring.rag.stores.store import FIELDS, Filter, Hit, TextStore, VectorStore, kind_of


class Lexical(Protocol):
    """What a pipeline asks by words: the chunks that it knows, of which version of the store, and a search."""

    def __len__(self) -> int:
        """How many chunks there are."""
        ...

    @property
    def version(self) -> str: ...

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks that share a term with the query."""
        ...


@dataclass(frozen=True)
class LexicalIndex:
    """Position p of `bm25` is the chunk `ids[p]`, whose file, kind and title are row p of `fields`.

    Implements `Lexical`.
    """

    bm25: Bm25Index
    ids: list[str]
    fields: FieldColumns
    version: str

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks that share a term with the query."""
        ranking = self.bm25.search(query, k, self.fields.allowed(where))
        return [Hit(self.ids[p], float(s)) for p, s in zip(ranking.positions, ranking.scores, strict=True)]

    @staticmethod
    def build(store: VectorStore) -> LexicalIndex:
        """The index of the store's present contents. While a writer is at it, of some version since the call began."""
        version = store.version()
        chunks = list(store.scan())
        columns = (
            [c.file for c in chunks],
            [kind_of(c.file) for c in chunks],
            [c.title for c in chunks],
        )
        bm25 = Bm25Index.build(chunk.indexed_text for chunk in chunks)
        return LexicalIndex(bm25, [chunk.id for chunk in chunks], FieldColumns(columns), version)

    @staticmethod
    def refresh(directory: Path, store: VectorStore) -> None:
        """Writes the index of the present version, if it is not there, and removes older ones."""
        target = directory / store.version()
        if not (target / "chunks.json").is_file():
            built = LexicalIndex.build(store)
            shutil.rmtree(target, ignore_errors=True)
            with new_directory(target) as partial:
                built.bm25.save(partial / "postings")
                write_json(partial / "chunks.json", {"ids": built.ids, "fields": built.fields.rows()})
        for old in directory.iterdir():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)  # a reader that has it mapped keeps it

    @staticmethod
    def open(directory: Path, store: VectorStore) -> LexicalIndex:
        """The kept index of the present version; built in memory where there is none, or only a damaged one."""
        version = store.version()
        path = directory / version
        try:
            stored = json.loads((path / "chunks.json").read_bytes())
            bm25 = Bm25Index.load(path / "postings")
            if bm25.size != len(stored["ids"]) or bm25.size != len(stored["fields"]):
                raise ValueError(f"{path} holds parts that do not fit together")
            columns = [[row[n] for row in stored["fields"]] for n in range(len(FIELDS))]
            return LexicalIndex(bm25, stored["ids"], FieldColumns(columns), version)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return LexicalIndex.build(store)


@dataclass(frozen=True)
class StoreLexical:
    """The store's own full text; nothing is held in memory. Implements `Lexical`."""

    store: VectorStore

    def __post_init__(self) -> None:
        """Raises ConfigError if the store searches by vectors only."""
        text_store(self.store)

    def __len__(self) -> int:
        return self.store.count()

    @property
    def version(self) -> str:
        return self.store.version()

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks that share a word with the query."""
        return text_store(self.store).search_text(query, k, where)


def text_store(store: VectorStore) -> TextStore:
    """A store that searches by words too. Raises ConfigError if it searches by vectors only."""
    if not hasattr(store, "search_text"):
        raise ConfigError(f'{type(store).__name__} has no full text of its own: set lexical = "postings"')
    return cast(TextStore, store)
