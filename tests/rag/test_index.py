"""The index of a folder: changes, deletions, interruptions, locks, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mainspring.errors import (
    EmbeddingModelChangedError,
    EmptyCorpusError,
    StoreError,
    StoreLockedError,
)
from mainspring.rag.index import DocumentIndex, IndexProgress, read_manifest, remove_index
from mainspring.rag.retrieval.lexical import LexicalIndex, StoreLexical
from mainspring.rag.stores.lance import LanceStore
from mainspring.rag.stores.store import Condition
from mainspring.rag.strategy import IndexStep
from rag.fakes import WordEmbedder

STEP = IndexStep(size=20, overlap=0)


def open_index(
    directory: Path,
    step: IndexStep = STEP,
    embedder: WordEmbedder | None = None,
    store_text: bool = False,
) -> DocumentIndex:
    return DocumentIndex(
        directory,
        step,
        embedder or WordEmbedder(),
        lambda path, dimension: LanceStore(path / "store", dimension),
        store_text=store_text,
    )


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def texts(index: DocumentIndex) -> dict[str, str]:
    found: dict[str, str] = {}
    for chunk in sorted(index.store.scan(), key=lambda c: (c.file, c.start)):
        found[chunk.file] = found.get(chunk.file, "") + chunk.text
    return found


def test_only_what_changed_is_read_again_and_what_is_gone_goes(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="red fox.", b="blue whale.", sub__c="green tree.")
    embedder = WordEmbedder()
    index = open_index(folder / "index", embedder=embedder)  # inside of the folder, and not indexed itself
    report = index.update(folder)
    assert (report.added, report.changed, report.removed, report.unchanged) == (3, 0, 0, 0)
    write(folder, b="blue planet.")
    (folder / "a.md").unlink()
    os.utime(folder / "sub" / "c.md")  # touched, not changed
    embedder.embedded = 0
    report = open_index(folder / "index", embedder=embedder).update(folder)
    version = index.store.version()
    assert open_index(folder / "index").update(folder).unchanged == 2
    assert index.store.version() == version  # nothing was written
    assert (report.added, report.changed, report.removed, report.unchanged) == (0, 1, 1, 1)
    assert embedder.embedded == 1
    assert texts(index) == {"b.md": "blue planet.", "sub/c.md": "green tree."}


def test_the_lexical_index_follows_the_store_and_heals(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="red fox.", b="blue whale.")
    index = open_index(tmp_path / "index")
    index.update(folder)
    lexical = LexicalIndex.open(tmp_path / "index" / "bm25", index.store)
    assert [index.store.get([h.id])[0].file for h in lexical.search("fox", 5)] == ["a.md"]
    assert lexical.search("fox", 5, [Condition("file", "b", prefix=True)]) == []
    write(folder, c="another fox.")
    index.update(folder)
    assert len(list((tmp_path / "index" / "bm25").iterdir())) == 1
    [kept] = (tmp_path / "index" / "bm25").iterdir()
    (kept / "chunks.json").write_text("{")
    healed = LexicalIndex.open(tmp_path / "index" / "bm25", index.store)
    assert len(healed.search("fox", 5)) == 2


def test_only_what_searches_by_words_is_built(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", fox="The fox sleeps.", whale="The whale swims.")
    plain = open_index(tmp_path / "index")
    plain.update(docs)
    assert (tmp_path / "index" / "bm25").is_dir()
    with pytest.raises(StoreError, match="no full text"):
        StoreLexical(plain.store).search("fox", 5)

    directory = tmp_path / "by_store"
    index = open_index(directory, store_text=True)
    index.update(docs)
    assert not (directory / "bm25").exists()
    write(docs, otter="The otter dives.")
    index.update(docs)
    lexical = StoreLexical(index.store)
    assert [index.store.get([h.id])[0].file for h in lexical.search("otter", 5)] == ["otter.md"]

    late = open_index(tmp_path / "index", store_text=True)  # nothing new to read, only another way to search
    late.update(docs)
    assert len(StoreLexical(late.store).search("whale", 5)) == 1


def test_bad_files_are_reported_and_the_others_indexed(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", good="red fox.")
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "empty.md").write_text("")
    with open(folder / "huge.txt", "wb") as file:
        file.truncate(1 << 30)
    report = open_index(tmp_path / "index").update(folder)
    reasons = dict(report.failures)
    assert set(reasons) == {"bad.pdf", "binary.txt", "huge.txt"}
    assert "corrupt" in reasons["bad.pdf"]
    assert "1073741824 bytes" in reasons["huge.txt"]
    assert texts(open_index(tmp_path / "index")) == {"good.md": "red fox."}


def test_a_document_that_became_unreadable_leaves_the_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="red fox.", b="x.")
    index = open_index(tmp_path / "index")
    index.update(folder)
    (folder / "a.md").write_bytes(b"\0" * 100)
    assert [name for name, _ in index.update(folder).failures] == ["a.md"]
    assert set(texts(index)) == {"b.md"}


def test_an_empty_folder_is_refused_and_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="red fox.")
    index = open_index(tmp_path / "index")
    index.update(folder)
    (folder / "a.md").unlink()
    with pytest.raises(EmptyCorpusError):
        index.update(folder)
    assert set(texts(index)) == {"a.md"}


def test_another_embedding_model_is_refused_with_the_fix(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="red fox.")
    open_index(tmp_path / "index").update(folder)
    with pytest.raises(EmbeddingModelChangedError, match=r"'words', not 'other'.*use 'words'.*--rebuild"):
        open_index(tmp_path / "index", embedder=WordEmbedder("other"))
    with pytest.raises(
        StoreError, match=r"chunker 'split-sentence-20-0-headers', not 'split-sentence-30-0-headers'"
    ):
        open_index(tmp_path / "index", IndexStep(size=30, overlap=0))
    assert set(texts(open_index(tmp_path / "index"))) == {"a.md"}


def test_a_damaged_manifest_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    for content in ("{", "[]", json.dumps({"format": 99})):
        (tmp_path / "index" / "manifest.json").write_text(content)
        with pytest.raises(StoreError, match="index anew"):
            open_index(tmp_path / "index")
    assert read_manifest(tmp_path / "nothing") is None


def test_only_an_index_is_ever_deleted(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="precious.")
    with pytest.raises(StoreError, match="nothing was deleted"):
        remove_index(folder)
    assert (folder / "a.md").is_file()
    open_index(tmp_path / "index").update(folder)
    remove_index(tmp_path / "index")
    assert not (tmp_path / "index").exists()
    remove_index(tmp_path / "index")


RUN = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from rag.test_index import open_index, IndexProgress
import mainspring.rag.index as module
module._BATCH_CHUNKS = 4
class Slow(IndexProgress):
    def read(self, file, size):
        print(file, flush=True)
        import time; time.sleep(0.05)
open_index(Path({index!r})).update(Path({folder!r}), Slow())
"""


def run_slowly(tmp_path: Path, folder: Path) -> subprocess.Popen[str]:
    """An index run in a process of its own that names each file it has read."""
    names = {
        "tests": str(Path(__file__).parent.parent),
        "index": str(tmp_path / "index"),
        "folder": str(folder),
    }
    return subprocess.Popen([sys.executable, "-c", RUN.format(**names)], stdout=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_where_it_was_and_holds_no_lock(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", **{f"f{n:02}": f"passage {n}." for n in range(40)})
    process = run_slowly(tmp_path, folder)
    assert process.stdout is not None
    for _ in range(14):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    embedder = WordEmbedder()
    index = open_index(tmp_path / "index", embedder=embedder)
    before = texts(index)
    assert 8 <= len(before) < 40
    report = index.update(folder)
    assert report.unchanged == len(before)
    assert embedder.embedded == 40 - len(before)
    assert texts(index) == {f"f{n:02}.md": f"passage {n}." for n in range(40)}


def test_while_one_process_writes_another_is_refused_and_readers_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", **{f"f{n:02}": f"passage {n}." for n in range(30)})
    process = run_slowly(tmp_path, folder)
    assert process.stdout is not None
    for _ in range(10):
        process.stdout.readline()
    index = open_index(tmp_path / "index")
    with pytest.raises(StoreLockedError, match="another process is writing"):
        index.update(folder)
    lexical = LexicalIndex.build(index.store)
    assert len(lexical.ids) >= 4
    assert len(lexical.search("passage", 100)) == len(lexical.ids)
    process.communicate()
    assert process.returncode == 0
    assert index.store.count() == 30


def test_progress_counts_every_byte_of_what_is_new(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a="red fox.", b="whale.")

    class Listener(IndexProgress):
        total = 0
        done = 0
        chunks = 0

        def begin(self, total_bytes: int, unchanged: int) -> None:
            self.total = total_bytes

        def read(self, file: str, size: int) -> None:
            self.done += size

    listener = Listener()
    open_index(tmp_path / "index").update(folder, listener)
    assert listener.total == listener.done == 14


def test_searches_from_many_threads_agree(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "docs", **{f"f{n}": f"passage number {n} about topic {n % 3}." for n in range(20)}
    )
    index = open_index(tmp_path / "index")
    index.update(folder)
    query = WordEmbedder().embed_queries(["topic 2"])[0]
    expected = [h.id for h in index.store.search(query, 5)]
    results: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: results.append([h.id for h in index.store.search(query, 5)]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [expected] * 8
