"""A cross-encoder: query and passage read together (arXiv 1901.04085), the stand-in for the paper's monoT5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mainspring.rag.chunking.sentences import sentence_spans
from mainspring.rag.embedding.models import DEFAULT_RERANKER, model_directory
from mainspring.rag.embedding.onnx_model import OnnxModel

_WINDOW = 512
_MAX_QUERY = 128  # tokens of a query that are read


class CrossEncoder:
    """The ms-marco MiniLM cross-encoder; scores are the logits of its one output. Implements `Reranker`."""

    def __init__(self, model: str = DEFAULT_RERANKER, threads: int | None = None) -> None:
        """Raises ModelNotFoundError and CheckpointError."""
        self._model = OnnxModel(model_directory(model, "reranker"), threads)

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N] logits. A passage beyond the window is read in pieces and has the score of its best one."""
        return self.pair_scores([(query, passage) for passage in passages])

    def pair_scores(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """[N] logits of (query, passage) pairs, of several queries if wanted."""
        owners: list[int] = []
        ids: list[list[int]] = []
        types: list[list[int]] = []
        for owner, (query, passage) in enumerate(pairs):
            query_ids = self._query_ids(query)
            for piece in self._pieces(passage, _WINDOW - len(query_ids) - 1):
                owners.append(owner)
                ids.append([*query_ids, *piece])
                types.append([0] * len(query_ids) + [1] * len(piece))
        best = np.full(len(pairs), -np.inf, dtype=np.float32)
        for batch, logits, _ in self._model.run(ids, types):
            np.maximum.at(best, [owners[i] for i in batch], logits[:, 0])
        return best

    def _query_ids(self, query: str) -> list[int]:
        """[CLS] query [SEP]; of a query beyond _MAX_QUERY tokens, its beginning."""
        ids = self._model.tokens.encode([query])[0]
        return ids if len(ids) <= _MAX_QUERY else [*ids[: _MAX_QUERY - 1], ids[-1]]

    def _pieces(self, passage: str, room: int) -> list[list[int]]:
        """The passage's tokens with [SEP] at the end of each piece of at most `room` tokens, cut after sentences."""
        ids = self._model.tokens.encode([passage])[0][1:]  # without [CLS]
        if len(ids) <= room:
            return [ids]
        separator = ids[-1]
        pieces: list[list[int]] = [[]]
        for start, end in sentence_spans(passage):
            sentence = self._model.tokens.encode([passage[start:end]])[0][1:-1]
            for first in range(0, len(sentence), room - 1):
                part = sentence[first : first + room - 1]
                if len(pieces[-1]) + len(part) > room - 1:
                    pieces.append([])
                pieces[-1].extend(part)
        return [[*piece, separator] for piece in pieces]
