"""Many token shards as one corpus: documents numbered through, tokens read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mainspring.errors import CheckpointError
from mainspring.train.shards import ShardWriter, TokenShard


class ShardSet:
    """Shards end to end. No document crosses from one to the next, so a window of one document lies in one file.

    offsets: [D + 1] int64, where each document begins, counted in tokens through all shards.
    Raises CheckpointError for a shard that cannot be read, or shards of different vocabularies.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._shards = [TokenShard(path) for path in paths]
        if not self._shards:
            raise CheckpointError("a set of token shards needs at least one file; prepare the data again")
        self.path = paths[0].parent if len(paths) > 1 else paths[0]
        self.vocab_size = self._shards[0].vocab_size
        for shard in self._shards:
            if shard.vocab_size != self.vocab_size:
                raise CheckpointError(
                    f"{shard.path} has a vocabulary of {shard.vocab_size}, {self._shards[0].path} one of "
                    f"{self.vocab_size}; shards of one corpus are made by one tokenizer: prepare the data again"
                )
        self._begins = np.cumsum([0] + [shard.num_tokens for shard in self._shards])
        self._first_documents = np.cumsum([0] + [shard.num_documents for shard in self._shards])
        pieces = [
            shard.offsets[:-1].astype(np.int64) + begin
            for shard, begin in zip(self._shards, self._begins[:-1], strict=True)
        ]
        self.offsets: NDArray[np.int64] = np.concatenate([*pieces, self._begins[-1:]])

    @property
    def num_documents(self) -> int:
        return int(self._first_documents[-1])

    @property
    def num_tokens(self) -> int:
        return int(self._begins[-1])

    def read(self, start: int, length: int) -> NDArray[np.unsignedinteger]:
        """Tokens start to start + length of one document: a view of its file."""
        number = int(np.searchsorted(self._begins, start, side="right")) - 1
        return self._shards[number].read(start - int(self._begins[number]), length)

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """The tokens of one document: a view of its file."""
        number = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        return self._shards[number].document(index - int(self._first_documents[number]))


class ShardSetWriter:
    """Streams documents into DIRECTORY/NAME-00000.tokens and so on, in a `with` block.

    A new file begins where the next document would take the last one beyond `max_tokens`. A file appears when it is
    complete; what a failure leaves is for the caller to delete.
    """

    def __init__(self, directory: Path, name: str, vocab_size: int, max_tokens: int) -> None:
        self._directory, self._name, self._vocab_size, self._max_tokens = (
            directory, name, vocab_size, max_tokens,
        )  # fmt: skip
        self.names: list[str] = []
        """Of the files, in their order."""
        self._writer: ShardWriter | None = None
        self._tokens = 0

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Appends a document. Raises RecipeError for an id outside the vocabulary."""
        if self._writer is None or (self._tokens and self._tokens + tokens.size > self._max_tokens):
            self._close(None, None, None)
            self._open()
        assert self._writer is not None  # just opened
        self._writer.add(tokens)
        self._tokens += int(tokens.size)

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(kind, error, trace)

    def _open(self) -> None:
        self.names.append(f"{self._name}-{len(self.names):05d}.tokens")
        self._writer = ShardWriter(self._directory / self.names[-1], self._vocab_size)
        self._tokens = 0

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(kind, error, trace)
