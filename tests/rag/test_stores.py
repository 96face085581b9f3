"""The conformance suite of vector stores: what every store must do, and what happens when processes die or meet."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mainspring.errors import ConfigError, StoreError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.documents.document import Place
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.pipeline import Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.stores.lance import LanceStore
from mainspring.rag.stores.milvus import MilvusStore
from mainspring.rag.stores.store import Condition, VectorStore
from mainspring.rag.strategy import RerankStep, RetrieveStep, Strategy
from rag.fakes import WordEmbedder

DIMENSION = 16
Opener = Callable[[], VectorStore]


def chunk(file: str, number: int, version: str = "1") -> Chunk:
    key = hashlib.sha256(f"{file}{number}{version}".encode()).hexdigest()
    text = f"passage {number} of {file}, it's “{version}”"
    places = ((0, Place("page", 3)), (5, Place("page", 4)))
    title = f"title of {file}"
    return Chunk(key[:24], file, key, title, number, number + 9, text, "h", text * 2, 0, places, 7)


def vectors(chunks: list[Chunk]) -> Vectors:
    rows = np.stack([np.random.default_rng(int(c.id[:8], 16)).standard_normal(DIMENSION) for c in chunks])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def put(store: VectorStore, file: str, count: int, version: str = "1") -> list[Chunk]:
    chunks = [chunk(file, n, version) for n in range(count)]
    store.replace([file], chunks, vectors(chunks))
    return chunks


@pytest.fixture(params=["lance", "lance-indexed", "milvus"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    opened: list[VectorStore] = []

    def opener() -> VectorStore:
        if request.param == "milvus":
            for store in opened:
                store.close()  # Milvus Lite serves one client a file
            opened.clear()
            opened.append(MilvusStore(str(tmp_path / "store.db"), DIMENSION))
        else:
            limit = 20 if request.param == "lance-indexed" else 50_000
            opened.append(LanceStore(tmp_path / "store", DIMENSION, index_from=limit))
        return opened[-1]

    yield opener
    for store in opened:
        store.close()


def test_a_chunk_comes_back_as_it_went_in_also_in_the_next_process(open_store: Opener) -> None:
    chunks = put(open_store(), "a's.md", 3)
    store = open_store()
    assert store.get([chunks[2].id, chunks[0].id]) == [chunks[2], chunks[0]]
    assert sorted(store.scan(), key=lambda c: c.start) == chunks
    assert store.count() == 3
    assert store.get([]) == []


def test_the_nearest_chunks_are_found_as_by_brute_force_with_and_without_filters(open_store: Opener) -> None:
    store = open_store()
    chunks = [c for f in ("docs/a.md", "docs/b.txt", "src/c_d.md", "src/cxd.md") for c in put(store, f, 12)]
    store.optimise()
    matrix = vectors(chunks)
    query = vectors([chunk("query", 0)])[0]
    filters: list[list[Condition]] = [
        [],
        [Condition("kind", "md")],
        [Condition("file", "docs/", prefix=True)],
        [Condition("file", "src/c_", prefix=True), Condition("kind", "md")],
        [Condition("title", "title of docs/b.txt")],
    ]
    for where in filters:
        scores = {
            c.id: float(s)
            for c, s in zip(chunks, matrix @ query, strict=True)
            if all(w.holds(c) for w in where)
        }
        expected = sorted(scores, key=lambda i: -scores[i])[:5]
        hits = store.search(query, 5, where)
        assert [h.id for h in hits] == expected, where
        assert [h.score for h in hits] == pytest.approx([scores[i] for i in expected], abs=0.02)


class Words(WordEmbedder):
    """In the suite's dimension."""

    dimension = DIMENSION


def test_hybrid_search_with_filters_runs_on_every_store_and_follows_its_writes(open_store: Opener) -> None:
    store, embedder = open_store(), Words()
    for file in ("a.md", "b.txt"):
        chunks = [chunk(file, n) for n in range(30)]
        store.replace([file], chunks, embedder.embed_passages([c.text for c in chunks]))
    store.optimise()

    def found(question: str, *where: Condition) -> list[tuple[str, str]]:
        strategy = Strategy(rerank=RerankStep("none"), retrieve=RetrieveStep(method="hybrid"))
        pipeline = Pipeline(strategy, Parts(embedder, store, LexicalIndex.build(store)))
        return [(p.chunk.file, p.chunk.text) for p in pipeline.search(question, where=where)]

    assert found("passage 17 of b")[0] == ("b.txt", chunk("b.txt", 17).text)
    only = found("passage 17", Condition("kind", "md"))
    assert only[0] == ("a.md", chunk("a.md", 17).text)
    assert {file for file, _ in only} == {"a.md"}
    store.replace(["a.md"], [], np.empty((0, DIMENSION), np.float32))
    assert found("passage 17", Condition("kind", "md")) == []
    assert found("passage 17")[0][0] == "b.txt"


def test_a_value_with_quotes_is_data_in_a_filter(open_store: Opener) -> None:
    store = open_store()
    put(store, "a.md", 1)
    for value in ("x' OR '1'='1", 'x" or id != "', "a.md' --"):
        assert store.search(vectors([chunk("q", 0)])[0], 5, [Condition("file", value)]) == []


def test_replacing_a_file_leaves_nothing_of_its_old_version_and_all_of_others(open_store: Opener) -> None:
    store = open_store()
    put(store, "a.md", 4)
    other = put(store, "b.md", 2)
    before = store.version()
    new = put(store, "a.md", 2, version="2")
    assert store.version() != before
    assert {c.id for c in store.scan()} == {c.id for c in [*new, *other]}
    assert (
        store.files() == {"a.md": new[-1].content_hash, "b.md": other[-1].content_hash} or store.count() == 4
    )
    store.replace(["a.md"], [], np.empty((0, DIMENSION), np.float32))
    assert set(store.files()) == {"b.md"}


def test_an_empty_store_finds_nothing(open_store: Opener) -> None:
    store = open_store()
    assert store.search(vectors([chunk("q", 0)])[0], 3) == []
    assert list(store.scan()) == []
    assert (store.count(), dict(store.files())) == (0, {})


def test_what_does_not_fit_is_refused_and_changes_nothing(open_store: Opener) -> None:
    store = open_store()
    chunks = put(store, "a.md", 2)
    with pytest.raises(StoreError, match=r"2 chunks need \[2, 16\]"):
        store.replace(["a.md"], chunks, np.zeros((2, 8), np.float32))
    assert store.get(["absent", chunks[0].id]) == chunks[:1]
    assert store.count() == 2


def test_a_store_of_another_dimension_is_refused_with_both(tmp_path: Path) -> None:
    LanceStore(tmp_path / "store", 16)
    with pytest.raises(StoreError, match="vectors of 16 numbers, the model gives 32"):
        LanceStore(tmp_path / "store", 32)


def test_a_reader_sees_a_file_before_or_after_its_replacement_never_between(tmp_path: Path) -> None:
    writer = LanceStore(tmp_path / "store", DIMENSION)
    put(writer, "a.md", 30, version="0")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from rag.test_stores import put, LanceStore, DIMENSION
store = LanceStore(Path({str(tmp_path / "store")!r}), DIMENSION)
for version in range(1, 15):
    put(store, "a.md", 30 + version, str(version))
"""
    reader = LanceStore(tmp_path / "store", DIMENSION)
    process = subprocess.Popen([sys.executable, "-c", code])
    seen = set()
    while process.poll() is None:
        texts = [c.text for c in reader.scan()]
        versions = {text.split("“")[1] for text in texts}
        assert len(versions) == 1
        assert len(texts) == 30 + int(versions.pop().rstrip("”"))
        seen.add(len(texts))
    assert process.returncode == 0
    assert len(list(reader.scan())) == 44


def test_a_writer_that_is_killed_loses_nothing_committed_and_the_store_goes_on(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from rag.test_stores import put, LanceStore, DIMENSION
store = LanceStore(Path({str(tmp_path / "store")!r}), DIMENSION)
for number in range(10_000):
    put(store, f"{{number}}.md", 5)
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    committed = -1
    for line in process.stdout:
        committed = int(line)
        if committed >= 3:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    store = LanceStore(tmp_path / "store", DIMENSION)
    assert {f"{n}.md" for n in range(committed + 1)} <= set(store.files())
    assert store.count() % 5 == 0
    put(store, "after.md", 2)
    assert store.count() % 5 == 2


@pytest.mark.parametrize("text", ["kind", "colour=red", "=x", "file^docs"])
def test_a_filter_that_names_no_field_is_refused_with_the_fields(text: str) -> None:
    with pytest.raises(ConfigError, match="file, kind, title"):
        Condition.parse(text)
    assert Condition.parse("file^=docs/a=b") == Condition("file", "docs/a=b", prefix=True)
