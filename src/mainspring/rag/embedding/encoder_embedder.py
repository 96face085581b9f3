"""Sentence embeddings by our own encoder over packed tokens: all-MiniLM-L6-v2 and models of its kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mainspring.errors import UnsupportedModelError
from mainspring.model.encoder import load_encoder
from mainspring.rag.embedding.embedder import (
    BertTokens,
    Progress,
    Vectors,
    batches_by_length,
    cut,
    refuse_long,
)

_BATCH_TOKENS = 4096  # more gains nothing on a CPU, and less makes the matrix products thin


class EncoderEmbedder:
    """A sentence-transformers directory whose pooling is the mean of all tokens, scaled to length 1.

    Implements `Embedder`. Thread-safe: nothing changes after construction.
    """

    def __init__(
        self, name: str, directory: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Raises CheckpointError and UnsupportedModelError."""
        _check_pooling(directory)
        self._encoder = load_encoder(directory, device=device, dtype=dtype)
        self._tokens = BertTokens(str(directory / "tokenizer.json"))
        self._name = name if dtype is torch.float32 else f"{name}-{str(dtype).removeprefix('torch.')}"
        configured = _json(directory / "sentence_bert_config.json").get("max_seq_length")
        positions = self._encoder.config.max_positions
        self._window = min(int(configured), positions) if isinstance(configured, int) else positions

    @property
    def name(self) -> str:
        return self._name

    @property
    def dimension(self) -> int:
        return self._encoder.config.hidden_size

    @property
    def window(self) -> int:
        return self._window

    def count(self, text: str) -> int:
        return self._tokens.count(text)

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        return self._tokens.spans(text)

    def embed_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """[N, dimension]; batches are packed by length, so that nothing is padded."""
        ids = self._tokens.encode(texts)
        refuse_long([len(x) for x in ids], texts, self._window, self._name)
        return self._embed(ids, progress)

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self._embed([cut(ids, self._window) for ids in self._tokens.encode(texts)], None)

    def embed_late(self, text: str, spans: Sequence[tuple[int, int]]) -> Vectors:
        """Late chunking (arXiv 2409.04701): the text is encoded whole, each span's own tokens are averaged.

        Spans in characters, [S, dimension] out. A text longer than the window is encoded in windows that overlap by
        half, and a token's state is taken from the window in whose middle it stands the deepest. Every span must
        hold a token.
        """
        ids, offsets = self._tokens.encode_with_spans(text)
        hidden = self._hidden_states(ids[1:-1], ids[0], ids[-1])
        result = np.empty((len(spans), self.dimension), dtype=np.float32)
        starts = np.array([start for start, _ in offsets[1:-1]])
        for row, (start, end) in enumerate(spans):
            first, last = np.searchsorted(starts, (start, end))
            if first == last:
                raise UnsupportedModelError(f"no token of the text begins in the span {start} to {end}")
            mean = hidden[first:last].mean(0)
            result[row] = (mean / mean.norm()).numpy()
        return result

    def _hidden_states(self, tokens: list[int], first: int, last: int) -> torch.Tensor:
        """[len(tokens), dimension] float32, special tokens left out again."""
        room = self._window - 2
        out = torch.empty(len(tokens), self.dimension)
        starts = [0]
        while starts[-1] + room < len(tokens):
            starts.append(min(starts[-1] + room // 2, len(tokens) - room))
        for i, start in enumerate(starts):
            piece = tokens[start : start + room]
            states = self._forward([[first, *piece, last]])[1:-1]
            # Each window keeps what lies nearer to its middle than to its neighbours' middles.
            low = 0 if i == 0 else (starts[i - 1] + start + room) // 2
            out[low : start + len(piece)] = states[low - start :]
        return out

    def _embed(self, ids: Sequence[list[int]], progress: Progress | None) -> Vectors:
        out = np.empty((len(ids), self.dimension), dtype=np.float32)
        for batch in batches_by_length([len(x) for x in ids], _BATCH_TOKENS):
            with torch.inference_mode():
                out[batch] = self._encoder.mean_embeddings([ids[i] for i in batch]).cpu().numpy()
            if progress is not None:
                progress(len(batch))
        return out

    def _forward(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return self._encoder.hidden_states(sequences).float().cpu()


def _check_pooling(directory: Path) -> None:
    pooling = _json(directory / "1_Pooling" / "config.json")
    if pooling and not pooling.get("pooling_mode_mean_tokens"):
        raise UnsupportedModelError(
            f"{directory} does not pool by the mean of its tokens, which is all that is known"
        )


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
