"""Reads the container of a GGUF file: its metadata and where each tensor's bytes lie, every bound checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The types'
block sizes come from the `gguf` package; its own reader is not used because it takes seconds for a vocabulary
and meets a corrupt file with whatever numpy happens to raise.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mainspring.errors import CheckpointError, UnsupportedModelError

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_NESTING = 4
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor: `type` as ggml names it ("Q4_1"), `shape` in numpy's order, `rows` the raw bytes.

    `rows`: uint8 [number of rows, bytes a row], where a row is the last dimension (quantised blocks lie in rows).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    rows: npt.NDArray[np.uint8]


class GGUFHeader:
    """The metadata and the tensors of a mapped GGUF file. Raises CheckpointError if it is truncated or corrupt.

    `metadata` maps keys to bool, int, float, str, or lists of those. `tensors` maps GGUF's own names.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._position = 0
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                if self._size < 24:
                    self._refuse(f"is {self._size} bytes long: too short for a GGUF header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read the GGUF file {self.path}: {error.strerror}") from error
        tensor_count, pair_count = self._read_preamble()
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            self._read_pair()
        self.tensors: dict[str, GGUFTensor] = {}
        self._read_tensors(tensor_count)

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"the GGUF file {self.path} {problem}; fetch it anew")

    def _take(self, size: int) -> int:
        """Moves past `size` bytes and returns where they begin."""
        begin = self._position
        if size > self._size - begin:
            self._refuse(
                f"is truncated: its header goes on at byte {begin}, but the file has {self._size} bytes"
            )
        self._position = begin + size
        return begin

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._map, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        begin = self._take(length)
        try:
            return self._map[begin : begin + length].decode()
        except UnicodeDecodeError:
            self._refuse(f"is corrupt: the string at byte {begin} is not UTF-8")

    def _read_preamble(self) -> tuple[int, int]:
        magic = self._map[self._take(4) : 4]
        if magic != _MAGIC:
            self._refuse(f"does not begin with {_MAGIC!r} but with {magic!r}: it is not a GGUF file")
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(
                f"the GGUF file {self.path} is big-endian; only little-endian is supported"
            )
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"the GGUF file {self.path} has version {version}; supported are 2 and 3"
            )
        return self._scalar("Q"), self._scalar("Q")

    def _read_pair(self) -> None:
        key = self._string()
        if key in self.metadata:
            self._refuse(f"is corrupt: the key {key!r} occurs twice")
        self.metadata[key] = self._value(self._scalar("I"))

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY or depth == _MAX_NESTING:
            self._refuse(f"is corrupt: unknown value type {kind} before byte {self._position}")
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item_kind])
            begin = self._take(count * dtype.itemsize)
            return np.frombuffer(self._map, dtype, count, begin).tolist()
        if count > self._size - self._position:
            self._refuse(f"is truncated: an array of {count} items is announced before byte {self._position}")
        return [self._value(item_kind, depth + 1) for _ in range(count)]

    def _read_tensors(self, count: int) -> None:
        infos: list[tuple[str, str, tuple[int, ...], int]] = []
        for _ in range(count):
            name = self._string()
            dimensions = self._scalar("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                self._refuse(f"is corrupt: tensor {name!r} has {dimensions} dimensions")
            shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
            infos.append((name, self._type_name(name, self._scalar("I")), shape, self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            self._refuse(f"is corrupt: general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        reached = start
        for name, type_name, shape, offset in sorted(infos, key=lambda info: info[3]):
            if start + offset < reached or name in self.tensors:
                self._refuse(f"is corrupt: tensor {name!r} overlaps another or occurs twice")
            self.tensors[name] = self._tensor(name, type_name, shape, start + offset)
            reached = start + offset + self.tensors[name].rows.nbytes

    def _type_name(self, name: str, type_code: int) -> str:
        try:
            type_name = GGMLQuantizationType(type_code).name
        except ValueError:
            type_name = f"number {type_code}"
        if type_name not in SUPPORTED_TYPES:
            raise UnsupportedModelError(
                f"tensor {name!r} of {self.path} has the type {type_name}, which is not supported; "
                f"the supported ones are: {', '.join(SUPPORTED_TYPES)}"
            )
        return str(type_name)

    def _tensor(self, name: str, type_name: str, shape: tuple[int, ...], begin: int) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        if shape[-1] % block:
            self._refuse(
                f"is corrupt: tensor {name!r} has rows of {shape[-1]} for {type_name} blocks of {block}"
            )
        row_bytes = shape[-1] // block * block_bytes
        count = math.prod(shape[:-1])
        if begin + count * row_bytes > self._size:
            self._refuse(
                f"is truncated: tensor {name!r} ends at byte {begin + count * row_bytes}, the file at {self._size}"
            )
        raw = np.frombuffer(self._map, np.uint8, count * row_bytes, begin)
        return GGUFTensor(name, type_name, shape, raw.reshape(count, row_bytes))
