"""Stand-ins for models in tests of what runs on them: a bag-of-words embedder, a word-overlap reranker, a script."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mainspring.errors import PassageTooLongError
from mainspring.rag.embedding.embedder import Progress, Vectors
from mainspring.rag.generation.language_model import Message

_WORD = re.compile(r"\w+|[^\w\s]")


class WordEmbedder:
    """Words hashed into 64 dimensions; a token is a word. Implements `Embedder`."""

    dimension = 64

    def __init__(self, name: str = "words", window: int = 48) -> None:
        self.name = name
        self.window = window
        self.embedded = 0  # passages so far

    def count(self, text: str) -> int:
        return len(self.spans(text)) + 2

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in _WORD.finditer(text)]

    def embed_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        for text in texts:
            if self.count(text) > self.window:
                raise PassageTooLongError(f"{self.count(text)} tokens")
        self.embedded += len(texts)
        return self._embed(texts)

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts)

    def _embed(self, texts: Sequence[str]) -> Vectors:
        out = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in _WORD.findall(text.lower()):
                out[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return out / np.linalg.norm(out, axis=1, keepdims=True)


class OverlapReranker:
    """The share of the query's words that a passage has, less 0.3. Implements `Reranker`."""

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        words = set(re.findall(r"\w+", query.lower()))
        hits = [len(words & set(re.findall(r"\w+", p.lower()))) / max(len(words), 1) - 0.3 for p in passages]
        return np.array(hits, dtype=np.float32)


class ScriptedModel:
    """Answers what it was given, a few characters at a time, and remembers what it was asked."""

    name = "script"

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)
        self.asked: list[Sequence[Message]] = []

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        self.asked.append(messages)
        text = self._answers.pop(0)
        yield from (text[i : i + 3] for i in range(0, len(text), 3))
