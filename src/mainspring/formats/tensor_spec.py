"""What a stored tensor is: its dtype, its shape and its bytes, without any array library's tensor type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mainspring.errors import CheckpointError

# numpy's type of each safetensors dtype; those that numpy lacks are carried as unsigned integers.
NUMPY_DTYPES: Mapping[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "U16": "<u2", "I16": "<i2",
    "F16": "<f2", "BF16": "<u2", "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8",
    "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's safetensors dtype ("BF16", "F32", ...) and shape; CheckpointError for an unknown dtype."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in NUMPY_DTYPES:
            known = ", ".join(NUMPY_DTYPES)
            raise CheckpointError(
                f"tensor dtype {self.dtype!r} is not supported; the known ones are: {known}"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return np.dtype(NUMPY_DTYPES[self.dtype]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: row-major, little-endian bytes in `data`, a flat view, mostly of a mapped file.

    Pages of a mapped file are private: writing to `data` never reaches the file, only other views of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def numpy(self) -> npt.NDArray[Any]:
        """A view of the data in `shape`; BF16 and F8 elements come as unsigned integers of their width."""
        return np.frombuffer(self.data, NUMPY_DTYPES[self.dtype]).reshape(self.shape)
