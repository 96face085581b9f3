"""Milvus, for vectors on more than one machine (an address), and Milvus Lite (a file ending in .db).

A collection has no transactions: `replace` inserts the new rows before it deletes the old ones, so that a crash in
between leaves too much, which the next run of the index removes, and never too little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from mainspring.errors import StoreError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.stores.store import COLUMNS, Filter, Hit, chunk_of, row_of

_INTEGERS = {"first", "last", "context_first", "tokens"}
_MAX_TEXT = 65_535  # bytes of a string field
_PAGE = 1000  # rows of a query or an insertion at once
_T = TypeVar("_T")


class MilvusStore:
    """A collection. Implements `VectorStore`."""

    def __init__(self, address: str, dimension: int, *, collection: str = "chunks", token: str = "") -> None:
        """Connects to `http://host:19530` or opens a file; creates the collection if it is not there.

        Raises StoreError if it cannot be reached or has vectors of another size.
        """
        self._name = collection
        self._dimension = dimension
        try:
            self._client = MilvusClient(uri=address, token=token)
            if not self._client.has_collection(collection):
                self._create()
            self._client.load_collection(collection)
            fields = {f["name"]: f for f in self._client.describe_collection(collection)["fields"]}
        except (MilvusException, OSError, ValueError, ConnectionError) as error:
            raise StoreError(f"Milvus at {address} cannot be used: {error}") from error
        stored = int(fields["vector"]["params"]["dim"])
        if stored != dimension:
            raise StoreError(
                f"the collection {collection!r} holds vectors of {stored} numbers, not {dimension}"
            )

    def replace(self, files: Sequence[str], chunks: Sequence[Chunk], vectors: Vectors) -> None:
        if vectors.shape != (len(chunks), self._dimension):
            raise StoreError(
                f"{len(chunks)} chunks need {[len(chunks), self._dimension]} vectors, not {list(vectors.shape)}"
            )
        rows = [row_of(c) | {"vector": v.tolist()} for c, v in zip(chunks, vectors, strict=True)]
        for row in rows:
            longest = max(len(str(value).encode()) for name, value in row.items() if name != "vector")
            if longest > _MAX_TEXT:
                raise StoreError(
                    f"a chunk of {row['file']} has {longest} bytes; Milvus takes {_MAX_TEXT}: cut it smaller"
                )
        for first in range(0, len(rows), _PAGE):
            part = rows[first : first + _PAGE]
            self._guarded(lambda part=part: self._client.upsert(self._name, part))  # type: ignore[misc]  # a lambda's default has no type
        kept = {chunk.id for chunk in chunks}
        for first in range(0, len(files), _PAGE):
            names = json.dumps(list(files[first : first + _PAGE]))
            stale = [r["id"] for r in self._query(f"file in {names}", ["id"]) if r["id"] not in kept]
            for start in range(0, len(stale), _PAGE):
                ids = stale[start : start + _PAGE]
                self._guarded(lambda ids=ids: self._client.delete(self._name, ids=ids))  # type: ignore[misc]  # a lambda's default has no type

    def files(self) -> Mapping[str, str]:
        return {row["file"]: row["content_hash"] for row in self._query("", ["file", "content_hash"])}

    def count(self) -> int:
        rows = self._guarded(
            lambda: self._client.query(
                self._name, filter="", output_fields=["count(*)"], consistency_level="Strong"
            )
        )
        return int(rows[0]["count(*)"])

    def version(self) -> str:
        """A hash of the ids: the collection keeps no version of its own."""
        ids = sorted(row["id"] for row in self._query("", ["id"]))
        return hashlib.sha256("".join(ids).encode()).hexdigest()[:16]

    def search(self, vector: npt.NDArray[np.float32], k: int, where: Filter = ()) -> list[Hit]:
        found = self._guarded(
            lambda: self._client.search(
                self._name,
                data=[vector.tolist()],
                filter=_expression(where),
                limit=k,
                output_fields=["id"],
                search_params={"metric_type": "COSINE"},
                consistency_level="Strong",
            )
        )
        return [Hit(str(hit["id"]), float(hit["distance"])) for hit in found[0]]

    def get(self, ids: Sequence[str]) -> list[Chunk]:
        found = (
            {row["id"]: chunk_of(row) for row in self._query(f"id in {json.dumps(list(ids))}", COLUMNS)}
            if ids
            else {}
        )
        return [found[i] for i in ids if i in found]

    def scan(self) -> Iterator[Chunk]:
        for row in sorted(self._query("", COLUMNS), key=lambda row: str(row["id"])):
            yield chunk_of(row)

    def optimise(self) -> None:
        self._guarded(lambda: self._client.flush(self._name))

    def close(self) -> None:
        self._client.close()

    def _query(self, expression: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        """Every row that fulfils an expression."""

        def read() -> list[dict[str, Any]]:
            iterator = self._client.query_iterator(
                self._name,
                batch_size=_PAGE,
                filter=expression,
                output_fields=list(fields),
                consistency_level="Strong",
            )
            rows: list[dict[str, Any]] = []
            try:
                while page := iterator.next():
                    rows.extend(dict(row) for row in page)
            finally:
                iterator.close()
            return rows

        return self._guarded(read)

    def _create(self) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
        for name in (*COLUMNS[1:], "kind"):
            if name in _INTEGERS:
                schema.add_field(name, DataType.INT64)
            else:
                schema.add_field(name, DataType.VARCHAR, max_length=_MAX_TEXT)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dimension)
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        self._client.create_collection(self._name, schema=schema, index_params=index)

    @staticmethod
    def _guarded(action: Callable[[], _T]) -> _T:
        try:
            return action()
        except MilvusException as error:
            raise StoreError(f"Milvus failed: {error}") from error


def _expression(where: Filter) -> str:
    """Milvus's filter. In LIKE, % and _ stand for anything and are escaped."""
    parts = []
    for condition in where:
        if condition.prefix:
            pattern = condition.value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            parts.append(f"{condition.field} like {json.dumps(pattern)}")
        else:
            parts.append(f"{condition.field} == {json.dumps(condition.value)}")
    return " and ".join(parts)
