"""A BERT model as an ONNX file: padded batches sorted by length, by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from mainspring.errors import CheckpointError
from mainspring.rag.embedding.embedder import BertTokens, batches_by_length

_BATCH_TOKENS = 2048  # on a CPU onnxruntime is fastest while a batch's activations stay in the cache


class OnnxModel:
    """A session and its tokenizer. Runs from several threads at once."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        """Raises CheckpointError if the files are not an ONNX model with its tokenizer."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            self.tokens = BertTokens(str(directory / "tokenizer.json"))
        except Exception as error:  # both libraries raise bare exceptions
            raise CheckpointError(f"{directory} is not an ONNX model with its tokenizer: {error}") from error
        self._inputs = {item.name for item in self._session.get_inputs()}

    def run(
        self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[list[int], npt.NDArray[np.float32], list[int]]]:
        """Yields (indices, first output [B, ...], lengths) batch by batch, in order of length."""
        lengths = [len(x) for x in ids]
        for batch in batches_by_length(lengths, _BATCH_TOKENS):
            width = lengths[batch[-1]]
            tokens = np.zeros((len(batch), width), dtype=np.int64)
            mask = np.zeros_like(tokens)
            segments = np.zeros_like(tokens)
            for row, index in enumerate(batch):
                tokens[row, : lengths[index]] = ids[index]
                mask[row, : lengths[index]] = 1
                if types is not None:
                    segments[row, : lengths[index]] = types[index]
            feeds = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": segments}
            feeds = {name: value for name, value in feeds.items() if name in self._inputs}
            yield batch, self._session.run(None, feeds)[0], [lengths[i] for i in batch]
