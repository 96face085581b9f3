"""The default store: LanceDB, embedded, in a directory. Every write is one atomic new version of a table.

Vectors are searched exactly, by a scan over 8-bit copies in memory whose best are looked at again in float32; from
`index_from` rows on by an HNSW graph with vectors of 8 bits (recall and times: docs/results/rag.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lancedb.index import FTS, BTree, HnswSq
from lancedb.query import FullTextOperator, MultiMatchQuery

from mainspring.errors import StoreError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.stores.field_columns import FieldColumns
from mainspring.rag.stores.store import COLUMNS, FIELDS, Filter, Hit, chunk_of, row_of
from mainspring.rag.stores.vector_scan import VectorScan

_TABLE = "chunks"
_INTEGERS = {"first", "last", "context_first", "tokens"}
_KEPT = timedelta(hours=1)  # readers that opened an old version have so long
_SCAN = 4096  # rows at once
_TEXTS = ["text", "header"]  # what is searched by words


@dataclass(frozen=True)
class _Memory:
    """What searching one version takes: chunk ids in the order of storage, where each stands, vectors, fields."""

    version: int
    ids: list[str]
    position: dict[str, int]
    scan: VectorScan
    fields: FieldColumns


class LanceStore:
    """A table in `directory`. Implements `VectorStore` and `TextStore`; reads may come from several threads."""

    def __init__(self, directory: Path, dimension: int, *, index_from: int = 300_000) -> None:
        """Opens or creates the table. Raises StoreError if it is damaged or has vectors of another size."""
        self._dimension = dimension
        self._index_from = index_from
        self._lock = threading.Lock()
        self._memory: _Memory | None = None
        try:
            database = lancedb.connect(directory, read_consistency_interval=timedelta(0))
            self._table = _open_table(database, dimension)
            stored = self._table.schema.field("vector").type.list_size
        except Exception as error:  # lancedb raises bare exceptions
            raise StoreError(f"the store in {directory} cannot be opened: {_first_line(error)}") from error
        if stored != dimension:
            raise StoreError(
                f"the store in {directory} holds vectors of {stored} numbers, the model gives {dimension}"
            )

    def replace(self, files: Sequence[str], chunks: Sequence[Chunk], vectors: Vectors) -> None:
        """One commit: the rows of `chunks` come, all other rows of `files` go."""
        if vectors.shape != (len(chunks), self._dimension):
            raise StoreError(
                f"{len(chunks)} chunks need {[len(chunks), self._dimension]} vectors, not {list(vectors.shape)}"
            )
        if not files:
            return
        names = ", ".join(_quoted(name) for name in files)
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge = merge.when_not_matched_by_source_delete(f"file IN ({names})")
        self._guarded(lambda: merge.execute(_batch(chunks, vectors)))

    def files(self) -> Mapping[str, str]:
        rows = self._rows(["file", "content_hash"])
        return dict(zip(rows["file"].to_pylist(), rows["content_hash"].to_pylist(), strict=True))

    def count(self) -> int:
        return int(self._guarded(self._table.count_rows))

    def version(self) -> str:
        return str(self._guarded(lambda: self._table.version))

    def search(self, vector: npt.NDArray[np.float32], k: int, where: Filter = ()) -> list[Hit]:
        if self._is_indexed():
            query: Any = self._table.search(vector)
            query = query.distance_type("cosine").nprobes(20).ef(max(2 * k, 100)).refine_factor(2)
            if where:
                query = query.where(_sql(where), prefilter=True)
            found = self._guarded(lambda: query.select(["id", "_distance"]).limit(k).to_arrow())
            distances = found["_distance"].to_pylist()
            return [Hit(i, 1 - d) for i, d in zip(found["id"].to_pylist(), distances, strict=True)]
        memory = self._in_memory()
        ranking = memory.scan.search(vector, k, memory.fields.allowed(where))
        return [Hit(memory.ids[p], float(s)) for p, s in zip(ranking.positions, ranking.scores, strict=True)]

    def search_text(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """At most k chunks by LanceDB's own BM25 over text and headings (English stems, no stop words).

        Chunks that were written after the last `optimise` are found too, by reading them. Raises StoreError before
        `prepare_text`.
        """
        if not all(self._has_index(column) for column in _TEXTS):
            if self.count() == 0:
                return []
            raise StoreError(
                "the store has no full text of its chunks: run `mainspring rag index` once more with a strategy whose "
                'retrieve.lexical is "store"'
            )
        search: Any = self._table.search(
            MultiMatchQuery(query, _TEXTS, boosts=None, operator=FullTextOperator.OR), query_type="fts"
        )
        if where:
            search = search.where(_sql(where), prefilter=True)
        found = self._guarded(lambda: search.select(["id", "_score"]).limit(k).to_arrow())
        return [Hit(i, s) for i, s in zip(found["id"].to_pylist(), found["_score"].to_pylist(), strict=True)]

    def prepare_text(self) -> None:
        """Builds the full text, unless it is there: from then on `optimise` extends it."""
        if self.count() == 0:
            return
        for column in _TEXTS:
            if not self._has_index(column):
                words = FTS(stem=True, remove_stop_words=True, lower_case=True)
                self._guarded(lambda c=column, w=words: self._table.create_index(c, config=w))

    def get(self, ids: Sequence[str]) -> list[Chunk]:
        if not ids:
            return []
        found = self._taken(ids)
        if found is not None:
            return [found[i] for i in ids if i in found]
        names = ", ".join(_quoted(i) for i in ids)
        rows = self._guarded(
            lambda: (
                self._table.search()
                .where(f"id IN ({names})")
                .select(list(COLUMNS))
                .limit(len(ids))
                .to_arrow()
            )
        )
        found = {row["id"]: chunk_of(row) for row in rows.to_pylist()}
        return [found[i] for i in ids if i in found]

    def scan(self) -> Iterator[Chunk]:
        rows = self._rows(list(COLUMNS))
        for batch in rows.to_batches(max_chunksize=_SCAN):
            for row in batch.to_pylist():
                yield chunk_of(row)

    def optimise(self) -> None:
        """Joins small files, drops versions older than an hour, extends the indexes that are there.

        Builds the graph once there are rows enough.
        """
        self._guarded(lambda: self._table.optimize(cleanup_older_than=_KEPT))
        if self.count() >= self._index_from and not self._is_indexed():
            graph = HnswSq(distance_type="cosine")
            self._guarded(lambda: self._table.create_index("id", config=BTree()))
            self._guarded(lambda: self._table.create_index("vector", config=graph))

    def close(self) -> None:
        with self._lock:
            self._memory = None

    def _is_indexed(self) -> bool:
        return self._has_index("vector")

    def _has_index(self, column: str) -> bool:
        return any(column in index.columns for index in self._guarded(self._table.list_indices))

    def _in_memory(self) -> _Memory:
        """The current version's, read once."""
        with self._lock:
            version = int(self._guarded(lambda: self._table.version))
            if self._memory is None or self._memory.version != version:
                rows = self._rows(["id", *FIELDS, "vector"])
                flat = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                vectors = flat.astype(np.float32, copy=False).reshape(-1, self._dimension)
                ids = rows["id"].to_pylist()
                self._memory = _Memory(
                    version,
                    ids,
                    {chunk_id: place for place, chunk_id in enumerate(ids)},
                    VectorScan(vectors),
                    FieldColumns([rows[field].to_pylist() for field in FIELDS]),
                )
            return self._memory

    def _taken(self, ids: Sequence[str]) -> dict[str, Chunk] | None:
        """Chunks by their places in the version in memory; None where none is, or it is no longer the current one."""
        memory = self._memory
        if memory is None or int(self._guarded(lambda: self._table.version)) != memory.version:
            return None
        places = [memory.position[i] for i in ids if i in memory.position]
        if not places:
            return {}
        rows = self._guarded(lambda: self._table.take_offsets(places).select(list(COLUMNS)).to_arrow())
        found = {row["id"]: chunk_of(row) for row in rows.to_pylist()}
        wanted = {memory.ids[place] for place in places}
        return found if set(found) == wanted else None  # a writer came in between

    def _rows(self, columns: list[str]) -> pa.Table:
        """All rows, in the order of their storage."""
        return self._guarded(lambda: self._table.search().select(columns).to_arrow())

    @staticmethod
    def _guarded(action: Any) -> Any:
        try:
            return action()
        except StoreError:
            raise
        except Exception as error:  # lancedb raises bare exceptions
            raise StoreError(f"the store failed: {_first_line(error)}") from error


def _open_table(database: Any, dimension: int) -> Any:
    if _TABLE in database.list_tables().tables:
        return database.open_table(_TABLE)
    return database.create_table(_TABLE, schema=_schema(dimension), exist_ok=True)


def _schema(dimension: int) -> pa.Schema:
    columns = [
        pa.field(n, pa.int64() if n in _INTEGERS else pa.string(), nullable=False) for n in (*COLUMNS, "kind")
    ]
    return pa.schema([*columns, pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False)])


def _batch(chunks: Sequence[Chunk], vectors: Vectors) -> pa.Table:
    schema = _schema(vectors.shape[1])
    rows = [row_of(chunk) for chunk in chunks]
    columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names[:-1]]
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel(), pa.float32())
    return pa.Table.from_arrays(
        [*columns, pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])], schema=schema
    )


def _sql(where: Filter) -> str:
    return " AND ".join(
        f"starts_with({c.field}, {_quoted(c.value)})" if c.prefix else f"{c.field} = {_quoted(c.value)}"
        for c in where
    )


def _quoted(text: str) -> str:
    """A SQL string."""
    return "'" + text.replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
