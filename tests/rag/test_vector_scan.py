"""The exact scan finds what brute force finds, and columns of fields filter as conditions do one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainspring.errors import ConfigError, StoreError
from mainspring.rag.retrieval.lexical import LexicalIndex, StoreLexical
from mainspring.rag.stores.field_columns import FieldColumns
from mainspring.rag.stores.lance import LanceStore
from mainspring.rag.stores.milvus import MilvusStore
from mainspring.rag.stores.store import Condition
from mainspring.rag.stores.vector_scan import VectorScan
from rag.test_stores import DIMENSION, chunk, put, vectors


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("count", [3, 500, 9000])
def test_the_scan_finds_the_nearest_with_their_full_precision_cosines(count: int) -> None:
    generator = np.random.default_rng(count)
    centres = generator.standard_normal((20, 64))
    matrix = unit(centres[generator.integers(20, size=count)] + 0.3 * generator.standard_normal((count, 64)))
    scan = VectorScan(matrix)
    for _ in range(10):
        query = unit(centres[generator.integers(20)] + 0.3 * generator.standard_normal(64))
        allowed = generator.random(count) < 0.5
        for mask in (None, allowed):
            scores = np.where(mask, matrix @ query, -2) if mask is not None else matrix @ query
            expected = np.argsort(-scores, kind="stable")[: min(25, count if mask is None else mask.sum())]
            found = scan.search(query, 25, mask)
            assert found.positions.tolist() == expected.tolist()
            np.testing.assert_allclose(found.scores, scores[expected], atol=1e-6)


texts = st.text(alphabet="ab/.", max_size=4)
conditions = st.builds(Condition, st.sampled_from(["file", "kind", "title"]), texts, st.booleans())


@given(st.lists(st.tuples(texts, texts, texts), max_size=20), st.lists(conditions, max_size=3))
def test_columns_filter_as_each_row_by_itself_would(
    rows: list[tuple[str, str, str]], where: list[Condition]
) -> None:
    columns = FieldColumns([[row[n] for row in rows] for n in range(3)])
    assert columns.rows() == [list(row) for row in rows]
    names = ("file", "kind", "title")
    expected = [
        all(
            value.startswith(c.value) if c.prefix else value == c.value
            for c in where
            for value in [row[names.index(c.field)]]
        )
        for row in rows
    ]
    mask = columns.allowed(where)
    assert mask is None if not where else mask is not None and mask.tolist() == expected


def test_the_stores_full_text_finds_stems_headings_and_filtered_chunks(tmp_path: Path) -> None:
    store = LanceStore(tmp_path / "store", DIMENSION)
    lexical = StoreLexical(store)
    assert lexical.search("passages", 5) == []
    chunks = put(store, "a.md", 4) + put(store, "b.txt", 4)
    store.optimise()
    with pytest.raises(StoreError, match=r"no full text.*rag index"):  # and not: nothing found
        lexical.search("passages", 8)
    store.prepare_text()
    assert len(lexical) == 8
    found = lexical.search("passages", 8)  # "passage" stands in each
    assert {hit.id for hit in found} == {c.id for c in chunks}
    where = [Condition("kind", "txt")]
    assert {hit.id for hit in lexical.search("passages", 8, where)} == {c.id for c in chunks[4:]}
    assert lexical.search("absent", 5) == []
    late = put(store, "c.md", 1)
    assert late[0].id in {hit.id for hit in lexical.search("passage", 10)}
    ours = LexicalIndex.build(store)
    assert {h.id for h in ours.search("passages", 20)} == {h.id for h in lexical.search("passages", 20)}


def test_a_store_without_full_text_is_refused_with_the_fix(tmp_path: Path) -> None:
    store = MilvusStore(str(tmp_path / "m.db"), DIMENSION)
    try:
        with pytest.raises(ConfigError, match='lexical = "postings"'):
            StoreLexical(store)
    finally:
        store.close()


def test_chunks_are_read_by_place_until_a_writer_moves_them(tmp_path: Path) -> None:
    store = LanceStore(tmp_path / "store", DIMENSION)
    old = put(store, "a.md", 3) + put(store, "b.md", 3)
    store.search(vectors([chunk("q", 0)])[0], 2)  # reads the version into memory
    assert store.get([old[5].id, "absent", old[0].id]) == [old[5], old[0]]
    new = put(LanceStore(tmp_path / "store", DIMENSION), "a.md", 2, version="2")
    assert store.get([old[0].id, old[4].id, new[1].id]) == [old[4], new[1]]
