"""A pipeline's parts with their results and times kept by content, so that strategies share what they have in common.

The pipeline itself runs unchanged over them: a strategy is measured by the code that will serve it. A result's address
is made of everything that it depends on: the part's name, the corpus, the machine (for the time) and the inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.embedding.embedder import Embedder, Progress, Vectors
from mainspring.rag.generation.extraction import Summariser
from mainspring.rag.generation.language_model import LanguageModel, Message
from mainspring.rag.ranking.reranker import Reranker
from mainspring.rag.retrieval.lexical import Lexical
from mainspring.rag.retrieval.sentence_vectors import Sentences
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.stores.store import Filter, Hit, VectorStore

T = TypeVar("T")


class Recorder:
    """Runs parts through the cache and adds up what one question takes: seconds, and characters that models read."""

    def __init__(self, cache: StageCache, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cache = cache
        self._clock = clock
        self._machine = f"{platform.node()}, {os.cpu_count()} cores"
        self._inside = 0.0  # seconds spent in `call`, looking results up or making them
        self._recorded = 0.0  # seconds that the parts took when their results were made
        self._read = 0

    def call(self, stage: str, inputs: object, compute: Callable[[], Any], read: int = 0) -> Any:
        """The JSON value that `compute` gives for `inputs`, whose models read so many characters."""
        entered = self._clock()

        def timed() -> npt.NDArray[np.uint8]:
            began = self._clock()
            value = compute()
            return np.frombuffer(json.dumps([self._clock() - began, value]).encode(), dtype=np.uint8)

        kept = self._cache.get(stage, [self._machine, inputs], timed)
        seconds, value = json.loads(kept.tobytes())
        self._inside += self._clock() - entered
        self._recorded += seconds
        self._read += read
        return value

    def call_each(
        self,
        stage: str,
        inputs: Sequence[object],
        compute: Callable[[list[int]], Sequence[float]],
        weights: Sequence[float],
    ) -> list[float]:
        """A number for each of `inputs`; those that are not kept are computed at once, given by their indices.

        What that takes is shared out among them by `weights`, so that another call that needs some of them, and others
        beside, counts about what it would take alone.
        """
        entered = self._clock()

        def timed(missing: list[int]) -> list[npt.NDArray[np.float64]]:
            began = self._clock()
            values = compute(missing)
            each = (self._clock() - began) / sum(weights[i] for i in missing)
            return [
                np.array([each * weights[i], v], dtype=np.float64)
                for i, v in zip(missing, values, strict=True)
            ]

        rows = self._cache.get_rows(stage, [[self._machine, item] for item in inputs], timed)
        self._inside += self._clock() - entered
        self._recorded += sum(float(row[0]) for row in rows)
        return [float(row[1]) for row in rows]

    def count_read(self, characters: int) -> None:
        """So many characters were read by a model, kept result or not."""
        self._read += characters

    def measure(self, run: Callable[[], T]) -> tuple[T, float, int]:
        """(what `run` gives, the seconds it takes without a cache, the characters that models read)."""
        self._inside, self._recorded, self._read = 0.0, 0.0, 0
        began = self._clock()
        value = run()
        return value, self._clock() - began - self._inside + self._recorded, self._read


def corpus_address(chunks: Iterable[Chunk]) -> str:
    """A hash of everything that is searched and read: chunk ids, their texts and contexts, in the store's order."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(json.dumps([chunk.id, chunk.indexed_text, chunk.context]).encode())
    return digest.hexdigest()


def _address(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


@dataclass(frozen=True)
class CachedEmbedder:
    """Implements `Embedder`."""

    embedder: Embedder
    recorder: Recorder

    @property
    def name(self) -> str:
        return self.embedder.name

    @property
    def dimension(self) -> int:
        return self.embedder.dimension

    @property
    def window(self) -> int:
        return self.embedder.window

    def count(self, text: str) -> int:
        return self.embedder.count(text)

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        return self.embedder.spans(text)

    def embed_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        return self._vectors("passages", texts, lambda: self.embedder.embed_passages(texts, progress))

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self._vectors("queries", texts, lambda: self.embedder.embed_queries(texts))

    def _vectors(self, kind: str, texts: Sequence[str], compute: Callable[[], Vectors]) -> Vectors:
        read = sum(map(len, texts))
        rows = self.recorder.call(f"embed-{kind}", [self.name, list(texts)], lambda: compute().tolist(), read)
        return np.array(rows, dtype=np.float32).reshape(len(texts), self.dimension)


@dataclass(frozen=True)
class CachedLexical:
    """Implements `Lexical`."""

    lexical: Lexical
    corpus: str
    recorder: Recorder

    def __len__(self) -> int:
        return len(self.lexical)

    @property
    def version(self) -> str:
        return self.lexical.version

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        inputs = [type(self.lexical).__name__, self.corpus, query, k, repr(tuple(where))]
        rows = self.recorder.call("bm25", inputs, lambda: _rows(self.lexical.search(query, k, where)))
        return [Hit(chunk_id, score) for chunk_id, score in rows]


@dataclass(frozen=True)
class CachedStore:
    """Implements `VectorStore`; only searches are kept, and nothing is written."""

    store: VectorStore
    corpus: str
    embedder: str
    recorder: Recorder

    def search(self, vector: npt.NDArray[np.float32], k: int, where: Filter = ()) -> list[Hit]:
        address = hashlib.sha256(np.ascontiguousarray(vector).tobytes()).hexdigest()
        kind = type(self.store).__name__
        inputs = [kind, self.corpus, self.embedder, address, k, repr(tuple(where))]
        rows = self.recorder.call("dense", inputs, lambda: _rows(self.store.search(vector, k, where)))
        return [Hit(chunk_id, score) for chunk_id, score in rows]

    def replace(self, files: Sequence[str], chunks: Sequence[Chunk], vectors: Vectors) -> None:
        self.store.replace(files, chunks, vectors)

    def files(self) -> Mapping[str, str]:
        return self.store.files()

    def count(self) -> int:
        return self.store.count()

    def version(self) -> str:
        return self.store.version()

    def get(self, ids: Sequence[str]) -> list[Chunk]:
        return self.store.get(ids)

    def scan(self) -> Iterator[Chunk]:
        return self.store.scan()

    def optimise(self) -> None:
        self.store.optimise()

    def close(self) -> None:
        self.store.close()


@dataclass(frozen=True)
class CachedSentences:
    """Implements `Sentences`."""

    sentences: Sentences
    embedder: str
    recorder: Recorder

    def prepare(self, passages: Sequence[str], progress: Progress | None = None) -> None:
        self.sentences.prepare(passages, progress)

    def cosines(self, vector: npt.NDArray[np.float32], passages: Sequence[str]) -> npt.NDArray[np.float32]:
        address = hashlib.sha256(np.ascontiguousarray(vector).tobytes()).hexdigest()
        compute = self.sentences.cosines
        row = self.recorder.call(
            "sentences",
            [self.embedder, address, _address(passages)],
            lambda: compute(vector, passages).tolist(),
        )
        return np.array(row, dtype=np.float32)


@dataclass(frozen=True)
class CachedReranker:
    """Implements `Reranker`. `reads`: whether passages go through a model for each question.

    Scores are kept pair by pair: strategies that rerank other candidates, or more of them, share most of the work.
    """

    reranker: Reranker
    name: str
    recorder: Recorder
    reads: bool = True

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        lengths = [len(query) + len(passage) for passage in passages]
        self.recorder.count_read(len(query) + (sum(lengths) if self.reads else 0))
        found = self.recorder.call_each(
            "rerank pair",
            [[self.name, query, passage] for passage in passages],
            lambda missing: self.reranker.scores(query, [passages[i] for i in missing]).tolist(),
            lengths,
        )
        return np.array(found, dtype=np.float32)


@dataclass(frozen=True)
class CachedSummariser:
    """Implements `Summariser`."""

    summariser: Summariser
    name: str
    recorder: Recorder

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        inputs = [self.name, question, _address(passages), ratio]
        compute = self.summariser.summarise
        found: list[str] = self.recorder.call(
            "summarise", inputs, lambda: compute(question, passages, ratio), sum(map(len, passages))
        )
        return found


@dataclass(frozen=True)
class CachedModel:
    """Implements `LanguageModel`; a text comes in one piece."""

    model: LanguageModel
    recorder: Recorder

    @property
    def name(self) -> str:
        return self.model.name

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        written = [[message.role, message.content] for message in messages]
        yield self.recorder.call(
            "model",
            [self.name, written, max_tokens],
            lambda: "".join(self.model.stream(messages, max_tokens)),
            sum(len(content) for _, content in written),
        )


def _rows(hits: Sequence[Hit]) -> list[tuple[str, float]]:
    return [(hit.id, hit.score) for hit in hits]
