"""Reads safetensors checkpoints: one file, or shards with an index, as Hugging Face lays them out.

The format (https://github.com/huggingface/safetensors): a little-endian u64 header length, a JSON header
that gives each tensor's dtype, shape and byte range, then the tensors' bytes without holes. The files are
mapped, so that reading holds no second copy of a model. `SafetensorsWriter` is the other direction.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from mainspring.errors import CheckpointError
from mainspring.formats.safetensors_writer import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsHelper,
    SafetensorsWriter,
)
from mainspring.formats.tensor_spec import TensorEntry, TensorSpec

__all__ = ["CheckpointReader", "SafetensorsHelper", "SafetensorsWriter", "TensorEntry", "TensorSpec"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class _MappedFile:
    """One safetensors file, validated whole on opening and mapped privately."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    self._refuse(f"is {size} bytes long: too short for a safetensors header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint file {path}: {error.strerror}") from error
        self._view = memoryview(self._map)
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        self._parse(size)

    def entry(self, name: str) -> TensorEntry:
        spec, (begin, end) = self.specs[name], self._ranges[name]
        return TensorEntry(name, spec.dtype, spec.shape, self._view[begin:end])

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"the checkpoint file {self.path} {problem}; fetch or write it anew")

    def _parse(self, size: int) -> None:
        (header_bytes,) = struct.unpack("<Q", self._view[:8])
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            self._refuse(
                f"announces a header of {header_bytes} bytes, but is {size} bytes long (headers may have at "
                f"most {MAX_HEADER_BYTES}): it is truncated or not a safetensors file"
            )
        try:
            header = json.loads(bytes(self._view[8 : 8 + header_bytes]), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a header that is not valid JSON ({error})")
        if not isinstance(header, dict):
            self._refuse("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict):
            self.metadata = {str(key): str(value) for key, value in metadata.items()}
        start = 8 + header_bytes
        for name, item in header.items():
            self._add(name, item, start)
        self._check_ranges(start, size)

    def _add(self, name: str, item: object, start: int) -> None:
        fields = item if isinstance(item, dict) else {}
        shape, offsets = fields.get("shape"), fields.get("data_offsets")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            self._refuse(
                f"describes tensor {name!r} as {str(item)[:200]}: "
                "shape and data_offsets must be lists of sizes"
            )
        spec = TensorSpec(str(fields.get("dtype")), tuple(shape))
        begin, end = offsets
        if end - begin != spec.nbytes:
            self._refuse(
                f"gives tensor {name!r} the bytes {begin} to {end}, but {spec.dtype} of shape {list(shape)} "
                f"takes {spec.nbytes} bytes"
            )
        self.specs[name] = spec
        self._ranges[name] = (start + begin, start + end)

    def _check_ranges(self, start: int, size: int) -> None:
        reached = start
        for name, (begin, end) in sorted(self._ranges.items(), key=lambda item: item[1]):
            if begin != reached:
                kind = "overlaps another tensor" if begin < reached else "leaves a hole before it"
                self._refuse(f"is corrupt: tensor {name!r} at byte {begin} {kind} (expected byte {reached})")
            reached = end
        if reached != size:
            kind = "truncated" if reached > size else "longer than its tensors"
            self._refuse(f"is {kind}: its header describes {reached} bytes, the file has {size}")


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


class CheckpointReader:
    """The tensors of a Hugging Face checkpoint directory (or of one safetensors file), memory-mapped.

    As in transformers, `model.safetensors` is taken if it is there, else the shards of
    `model.safetensors.index.json`. Everything is checked on opening: a missing, truncated or corrupt file,
    and an index that contradicts its shards, raise CheckpointError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        self._files: dict[str, _MappedFile] = {}
        if self.path.is_file():
            self._add_file(_MappedFile(self.path))
        elif (self.path / SINGLE_NAME).is_file():
            self._add_file(_MappedFile(self.path / SINGLE_NAME))
        elif (self.path / INDEX_NAME).is_file():
            self._open_index(self.path / INDEX_NAME)
        else:
            self._refuse_empty()

    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._files)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of tensor `name`; raises CheckpointError if there is none."""
        return self._file(name).specs[name]

    def entry(self, name: str) -> TensorEntry:
        """Tensor `name`, its data a view of the mapped file; raises CheckpointError if there is none."""
        return self._file(name).entry(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(file.specs[name].nbytes for name, file in self._files.items())

    def _file(self, name: str) -> _MappedFile:
        if name not in self._files:
            raise CheckpointError(
                f"the checkpoint {self.path} has no tensor {name!r} among its {len(self._files)}"
            )
        return self._files[name]

    def _add_file(self, file: _MappedFile) -> None:
        self._files.update(dict.fromkeys(file.specs, file))

    def _refuse_empty(self) -> NoReturn:
        if not self.path.exists():
            raise CheckpointError(f"there is no checkpoint at {self.path}")
        pickled = sorted(p.name for p in self.path.glob("*.bin")) or sorted(
            p.name for p in self.path.glob("*.pt*")
        )
        hint = (
            f"; {pickled[0]} is a pickle, which is never read: save the model as safetensors"
            if pickled
            else ""
        )
        raise CheckpointError(f"{self.path} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")

    def _open_index(self, index_path: Path) -> None:
        try:
            index = json.loads(index_path.read_bytes())
            weight_map = index["weight_map"]
            pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the index {index_path} is not a JSON object with a weight_map") from error
        shards: dict[str, _MappedFile] = {}
        for shard in dict.fromkeys(shard for _, shard in pairs):
            # An index is data from elsewhere: it must not name files outside its own directory.
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"the index {index_path} names {shard!r}: shards must lie beside it")
            shards[shard] = _MappedFile(self.path / shard)
        for name, shard in pairs:
            if name not in shards[shard].specs:
                raise CheckpointError(
                    f"the index {index_path} places tensor {name!r} in {shard}, which lacks it"
                )
            self._files[name] = shards[shard]
        for shard, file in shards.items():
            for name in file.specs:
                if self._files.get(name) is not file:
                    raise CheckpointError(
                        f"{shard} holds tensor {name!r}, which the index {index_path} places elsewhere"
                    )
