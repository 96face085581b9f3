"""The index of a folder: which files are in it, kept up to date by content, and searched meanwhile.

On disk a directory: `manifest.json` (what the index was made with), `store/` (chunks and vectors, unless the store is
elsewhere), `bm25/VERSION/` (the postings of one version of the store, unless words are searched by its own full text),
`lock`. A batch of files goes into the store in one write, so that a run that is stopped leaves whole files behind, and
the next goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mainspring.errors import DocumentError, EmbeddingModelChangedError, StoreError, StoreLockedError
from mainspring.formats.files import write_json
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.documents.document import Document
from mainspring.rag.documents.reading import FoundFile, find_files, read_bytes, read_document
from mainspring.rag.embedding.embedder import Embedder, Vectors
from mainspring.rag.embedding.encoder_embedder import EncoderEmbedder
from mainspring.rag.retrieval.lexical import LexicalIndex, text_store
from mainspring.rag.stores.store import VectorStore
from mainspring.rag.strategy import IndexStep

FORMAT = 1
_BATCH_CHUNKS = 512  # chunks that are embedded and written at once (and what a file has beyond them)


class IndexProgress:
    """Hears how indexing goes on; override what is of interest."""

    def begin(self, total_bytes: int, unchanged: int) -> None:
        """So many bytes of new and changed files are to be read."""

    def read(self, file: str, size: int) -> None:
        """A file of so many bytes was read and cut."""

    def embedded(self, chunks: int) -> None:
        """So many more chunks have their vectors."""

    def finishing(self) -> None:
        """All files are in; the search structures are being built."""


@dataclass(frozen=True)
class IndexReport:
    """What a run did. `failures` holds (file, reason) of documents that could not be read."""

    added: int
    changed: int
    removed: int
    unchanged: int
    chunks: int
    failures: tuple[tuple[str, str], ...]


@dataclass
class _Batch:
    """Files that are read and not yet written."""

    files: list[str] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    documents: dict[str, Document] = field(default_factory=dict)


class DocumentIndex:
    """An index directory with its store and embedding model. Searching needs no lock, `update` takes it."""

    def __init__(
        self,
        directory: Path,
        step: IndexStep,
        embedder: Embedder,
        open_store: Callable[[Path, int], VectorStore],
        *,
        store_text: bool = False,
    ) -> None:
        """Opens the index, or prepares a new one. `open_store` gets the directory and the vectors' dimension.

        With `store_text` words are searched by the store's full text, and no postings are made, which would have to
        fit into memory. Raises EmbeddingModelChangedError or StoreError if the index was made in another way or is
        damaged, ConfigError if the store has no full text.
        """
        self.directory = directory
        self.embedder = embedder
        self._step = step
        self._chunker = step.chunker()
        _check_manifest(directory, self._description())
        self.store = open_store(directory, embedder.dimension)
        self._text = text_store(self.store) if store_text else None

    def update(self, folder: Path, progress: IndexProgress | None = None) -> IndexReport:
        """Makes the index hold the folder's present documents: what is unchanged stays, what is gone goes.

        A document that cannot be read is reported and left out. Raises EmptyCorpusError if there is no document at
        all, StoreLockedError if another process is at it, StoreError.
        """
        progress = progress or IndexProgress()
        found = find_files(folder, exclude=[self.directory])
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory):
            write_json(self.directory / "manifest.json", self._description())
            report = self._update(found, progress)
            progress.finishing()
            if report.added or report.changed or report.removed:
                self.store.optimise()
            if self._text is not None:
                self._text.prepare_text()
            else:
                LexicalIndex.refresh(self.directory / "bm25", self.store)
        return report

    def _update(self, found: Sequence[FoundFile], progress: IndexProgress) -> IndexReport:
        known = dict(self.store.files())
        hashes, failures = _hashes(found)
        gone = [name for name in known if name not in hashes]
        if gone:
            self.store.replace(gone, [], np.empty((0, self.embedder.dimension), np.float32))
        todo = [file for file in found if file.name in hashes and hashes[file.name] != known.get(file.name)]
        progress.begin(sum(file.size for file in todo), len(hashes) - len(todo))
        batch = _Batch()
        for file in todo:
            try:
                document = read_document(file, read_bytes(file))
                chunks = self._chunker.split(document, self.embedder)
            except DocumentError as error:
                failures.append((file.name, str(error)))
                chunks = []
            else:
                batch.documents[file.name] = document
            batch.files.append(file.name)
            batch.chunks.extend(chunks)
            progress.read(file.name, file.size)
            if len(batch.chunks) >= _BATCH_CHUNKS:
                self._write(batch, progress)
                batch = _Batch()
        self._write(batch, progress)
        changed = sum(file.name in known for file in todo)
        failed = {name for name, _ in failures}
        return IndexReport(
            added=sum(file.name not in known and file.name not in failed for file in todo),
            changed=changed,
            removed=len(gone),
            unchanged=len(hashes) - len(todo),
            chunks=self.store.count(),
            failures=tuple(failures),
        )

    def _write(self, batch: _Batch, progress: IndexProgress) -> None:
        if batch.files:
            self.store.replace(batch.files, batch.chunks, self._embed(batch, progress))

    def _embed(self, batch: _Batch, progress: IndexProgress) -> Vectors:
        if not self._step.late:
            return self.embedder.embed_passages([c.indexed_text for c in batch.chunks], progress.embedded)
        if not isinstance(self.embedder, EncoderEmbedder):
            raise StoreError(f"late chunking needs token states, which {self.embedder.name} does not give")
        vectors = np.empty((len(batch.chunks), self.embedder.dimension), dtype=np.float32)
        for name, document in batch.documents.items():
            rows = [i for i, chunk in enumerate(batch.chunks) if chunk.file == name]
            if rows:
                spans = [(batch.chunks[i].start, batch.chunks[i].end) for i in rows]
                vectors[rows] = self.embedder.embed_late(document.text, spans)
                progress.embedded(len(rows))
        return vectors

    def _description(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "embedder": self.embedder.name,
            "dimension": self.embedder.dimension,
            "chunker": self._chunker.name,
            "late": self._step.late,
        }


def _hashes(found: Sequence[FoundFile]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Content hash of every readable file; (file, reason) of the others."""
    hashes: dict[str, str] = {}
    failures: list[tuple[str, str]] = []
    for file in found:
        try:
            hashes[file.name] = hashlib.sha256(read_bytes(file)).hexdigest()
        except DocumentError as error:
            failures.append((file.name, str(error)))
    return hashes, failures


def read_manifest(directory: Path) -> dict[str, object] | None:
    """What an index was made with, None if there is none. Raises StoreError if that is damaged."""
    path = directory / "manifest.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): remove {directory} and index anew") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise StoreError(
            f"{path} is of a format that this version does not read: remove {directory} and index anew"
        )
    return value


def _check_manifest(directory: Path, wanted: dict[str, object]) -> None:
    stored = read_manifest(directory)
    if stored is None:
        return
    for key in ("embedder", "dimension"):
        if stored.get(key) != wanted[key]:
            raise EmbeddingModelChangedError(
                f"the index {directory} was made with {key} {stored.get(key)!r}, not {wanted[key]!r}; their vectors "
                f"cannot be compared: use {stored.get('embedder')!r}, or index anew with --rebuild"
            )
    for key in ("chunker", "late"):
        if stored.get(key) != wanted[key]:
            raise StoreError(
                f"the index {directory} was made with {key} {stored.get(key)!r}, not {wanted[key]!r}: keep that "
                "setting, or index anew with --rebuild"
            )


def remove_index(directory: Path) -> None:
    """Deletes an index. Raises StoreError if the directory is none, StoreLockedError if a process writes to it."""
    if not directory.exists():
        return
    if not (directory / "manifest.json").is_file():
        raise StoreError(f"{directory} is not an index, nothing was deleted")
    with _locked(directory):
        shutil.rmtree(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the index's lock, which the system lets go when the process ends, however it does."""
    with open(directory / "lock", "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreLockedError(
                f"another process is writing to the index {directory}: wait until it is done (searching works)"
            ) from error
        yield
