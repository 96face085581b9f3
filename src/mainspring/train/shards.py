"""Token shards: documents as token ids in a file that is read by mmap.

Layout, all numbers little-endian:

    offset  0   8 bytes   b"MSTOKENS"
    offset  8   uint32    version, 1
    offset 12   uint32    bytes per token: 2 (uint16) or 4 (uint32)
    offset 16   uint64    vocabulary size; every token is smaller
    offset 24   uint64    number of documents, D
    offset 32   uint64    number of tokens, N
    offset 40   24 bytes  zero
    offset 64   N tokens, documents end to end, then zeros up to a multiple of 8
    then        D + 1 uint64: where each document begins, counted in tokens; the last is N
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mainspring.errors import CheckpointError, RecipeError
from mainspring.formats.files import beside, fsync_directory

_MAGIC = b"MSTOKENS"
_HEADER = struct.Struct("<8sIIQQQ24x")
_VERSION = 1


class ShardWriter:
    """Streams documents into one shard, in a `with` block. The file appears when the block ends, unless it raises."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path = path
        self._partial = beside(path)
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._ends = [0]
        self._stream = open(self._partial, "xb")  # noqa: SIM115 (closed by __exit__)
        self._stream.write(bytes(_HEADER.size))

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Appends a document. Raises RecipeError for an id outside the vocabulary."""
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab_size):
            worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
            raise RecipeError(f"token id {worst} lies outside the vocabulary of {self._vocab_size}")
        self._stream.write(tokens.astype(self._dtype).tobytes())
        self._ends.append(self._ends[-1] + int(tokens.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stream:
                if kind is None:
                    self._finish()
            if kind is None:
                os.replace(self._partial, self._path)
                fsync_directory(self._path.parent)
        finally:
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Writes the document offsets and the header."""
        num_tokens = self._ends[-1]
        self._stream.write(bytes(-num_tokens * self._dtype.itemsize % 8))
        self._stream.write(np.asarray(self._ends, dtype="<u8").tobytes())
        self._stream.seek(0)
        self._stream.write(
            _HEADER.pack(
                _MAGIC, _VERSION, self._dtype.itemsize, self._vocab_size, len(self._ends) - 1, num_tokens
            )
        )
        self._stream.flush()
        os.fsync(self._stream.fileno())


class TokenShard:
    """A shard opened for reading. `tokens` [N] and `offsets` [D + 1] are read-only views of the mapped file.

    Raises CheckpointError if the file is missing, is no shard, or is shorter or longer than its header says.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot open the token shard {path}: {error}") from error
        if len(mapped) < _HEADER.size:
            raise CheckpointError(
                f"{path} is no token shard: {len(mapped)} bytes, the header alone has {_HEADER.size}"
            )
        magic, version, width, vocab_size, num_documents, num_tokens = _HEADER.unpack_from(mapped)
        if magic != _MAGIC or version != _VERSION or width not in (2, 4):
            raise CheckpointError(f"{path} is no token shard of version {_VERSION}; prepare the data again")
        offsets_at = _HEADER.size + -(-num_tokens * width // 8) * 8
        expected = offsets_at + 8 * (num_documents + 1)
        if len(mapped) != expected:
            raise CheckpointError(
                f"{path} has {len(mapped)} bytes but its header says {expected}; prepare it again"
            )
        self.path = path
        self.vocab_size: int = vocab_size
        self.tokens: NDArray[np.unsignedinteger] = np.frombuffer(
            mapped, dtype=f"<u{width}", count=num_tokens, offset=_HEADER.size
        )
        self.offsets: NDArray[np.uint64] = np.frombuffer(
            mapped, dtype="<u8", count=num_documents + 1, offset=offsets_at
        )
        if (
            self.offsets[0] != 0
            or self.offsets[-1] != num_tokens
            or np.any(self.offsets[1:] < self.offsets[:-1])
        ):
            raise CheckpointError(f"{path}: the document offsets are not increasing from 0 to {num_tokens}")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> NDArray[np.unsignedinteger]:
        """Tokens start to start + length: a view of the file."""
        return self.tokens[start : start + length]

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """The tokens of one document: a view of the file."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]
