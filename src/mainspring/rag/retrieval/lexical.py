"""BM25 over a store's chunks: built once for a version of the store, kept beside it, found by chunk id."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mainspring.formats.files import new_directory, write_json
from mainspring.rag.retrieval.bm25 import Bm25Index
from mainspring.rag.stores.store import FIELDS, Filter, Hit, VectorStore, kind_of


class Lexical(Protocol):
    """What a pipeline asks by words: the chunks that it knows, of which version of the store, and a search."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def version(self) -> str: ...

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks that share a term with the query."""
        ...


@dataclass(frozen=True)
class LexicalIndex:
    """Position p of `bm25` is the chunk `ids[p]` with the filterable `fields[p]` (file, kind, title).

    Implements `Lexical`.
    """

    bm25: Bm25Index
    ids: list[str]
    fields: list[list[str]]
    version: str

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks that share a term with the query."""
        allowed = np.array([_holds(row, where) for row in self.fields], dtype=np.bool_) if where else None
        ranking = self.bm25.search(query, k, allowed)
        return [Hit(self.ids[p], float(s)) for p, s in zip(ranking.positions, ranking.scores, strict=True)]

    @staticmethod
    def build(store: VectorStore) -> LexicalIndex:
        """The index of the store's present contents. While a writer is at it, of some version since the call began."""
        version = store.version()
        chunks = list(store.scan())
        fields = [[chunk.file, kind_of(chunk.file), chunk.title] for chunk in chunks]
        bm25 = Bm25Index.build(chunk.indexed_text for chunk in chunks)
        return LexicalIndex(bm25, [chunk.id for chunk in chunks], fields, version)

    @staticmethod
    def refresh(directory: Path, store: VectorStore) -> None:
        """Writes the index of the present version, if it is not there, and removes older ones."""
        target = directory / store.version()
        if not (target / "chunks.json").is_file():
            built = LexicalIndex.build(store)
            shutil.rmtree(target, ignore_errors=True)
            with new_directory(target) as partial:
                built.bm25.save(partial / "postings")
                write_json(partial / "chunks.json", {"ids": built.ids, "fields": built.fields})
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
            return LexicalIndex(bm25, stored["ids"], stored["fields"], version)
        except (OSError, ValueError, KeyError, TypeError):
            return LexicalIndex.build(store)


def _holds(row: list[str], where: Filter) -> bool:
    values = dict(zip(FIELDS, row, strict=True))
    return all(values[c.field].startswith(c.value) if c.prefix else values[c.field] == c.value for c in where)
