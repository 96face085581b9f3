"""Sentence embeddings of an ONNX file: bge-small-en-v1.5, whose vector is the state of [CLS]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mainspring.rag.embedding.embedder import Progress, Vectors, cut, refuse_long
from mainspring.rag.embedding.onnx_model import OnnxModel

_WINDOW = 512
_QUERY_PREFIX = "Represent this sentence for searching relevant passages: "  # as the model was trained


class OnnxEmbedder:
    """A BGE model (arXiv 2309.07597) as ONNX. Implements `Embedder`."""

    def __init__(self, name: str, directory: Path, threads: int | None = None) -> None:
        """Raises CheckpointError."""
        self._model = OnnxModel(directory, threads)
        self._name = name
        self._dimension = int(next(self._model.run(self._model.tokens.encode(["probe"])))[1].shape[-1])

    @property
    def name(self) -> str:
        return self._name

    @property
    def dimension(self) -> int:
        return self._dimension

    @property
    def window(self) -> int:
        return _WINDOW

    def count(self, text: str) -> int:
        return self._model.tokens.count(text)

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        return self._model.tokens.spans(text)

    def embed_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        ids = self._model.tokens.encode(texts)
        refuse_long([len(x) for x in ids], texts, _WINDOW, self._name)
        return self._embed(ids, progress)

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        ids = self._model.tokens.encode([_QUERY_PREFIX + text for text in texts])
        return self._embed([cut(x, _WINDOW) for x in ids], None)

    def _embed(self, ids: Sequence[list[int]], progress: Progress | None) -> Vectors:
        rows: dict[int, Vectors] = {}
        for batch, states, _ in self._model.run(ids):
            first = states[:, 0]
            first = first / np.linalg.norm(first, axis=1, keepdims=True)
            rows.update(zip(batch, first, strict=True))
            if progress is not None:
                progress(len(batch))
        return (
            np.stack([rows[i] for i in range(len(ids))])
            if rows
            else np.empty((0, self._dimension), np.float32)
        )
