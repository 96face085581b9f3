"""Writes safetensors checkpoints straight into pre-sized files, slice by slice, without a second copy.

One file, or shards with an index, laid out as Hugging Face does; `CheckpointReader` is the other direction.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mainspring.errors import CheckpointError
from mainspring.formats.files import beside, fsync_directory, write_json
from mainspring.formats.tensor_spec import TensorSpec

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass
class _Shard:
    """One file being written: where it will stand, where it stands now, and what is still to come."""

    name: str
    partial: Path
    descriptor: int
    data_start: int

    def close(self) -> None:
        """Closes the file once; its number may belong to another file afterwards."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class _SliceWriter:
    """What writing into pre-sized files takes, whoever made them."""

    def __init__(self, directory: Path, specs: dict[str, TensorSpec]) -> None:
        self.directory = directory
        self._specs = specs
        self._written = dict.fromkeys(specs, 0)
        self._shards: list[_Shard] = []
        self._places: dict[str, tuple[_Shard, int]] = {}

    @property
    def written(self) -> dict[str, int]:
        """Bytes of each tensor that were written here."""
        return dict(self._written)

    def write(self, name: str, data: memoryview | bytes | npt.NDArray[Any], offset: int = 0) -> None:
        """Writes contiguous bytes of tensor `name`, starting `offset` bytes into it.

        Raises CheckpointError if there is no such tensor, the bytes lie outside it, or the disk fails.
        """
        view = _as_bytes(data)
        if name not in self._places:
            raise CheckpointError(f"the checkpoint {self.directory} has no place for tensor {name!r}")
        limit = self._specs[name].nbytes
        if offset < 0 or offset + len(view) > limit:
            raise CheckpointError(
                f"bytes {offset} to {offset + len(view)} lie outside tensor {name!r} of {limit} bytes"
            )
        shard, begin = self._places[name]
        self._pwrite(shard, view, begin + offset)
        self._written[name] += len(view)

    def write_block(self, name: str, block: npt.NDArray[Any], start: tuple[int, ...]) -> None:
        """Writes `block` so that its first element lands at index `start` of tensor `name`.

        `block` has as many dimensions as the tensor and elements of its width (BF16 as uint16). Raises
        CheckpointError as `write` does, and where block and tensor do not match.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise CheckpointError(f"the checkpoint {self.directory} has no place for tensor {name!r}")
        ends = tuple(s + n for s, n in zip(start, block.shape, strict=False))
        ranks = {len(start), block.ndim, len(spec.shape)}
        if (
            len(ranks) > 1
            or block.itemsize != spec.itemsize
            or any(s < 0 for s in start)
            or any(end > size for end, size in zip(ends, spec.shape, strict=True))
        ):
            raise CheckpointError(
                f"a block of shape {block.shape} ({block.dtype}) at {start} does not fit tensor {name!r}: "
                f"{spec.dtype} of shape {spec.shape}"
            )
        # The longest run of trailing dimensions that the block covers whole is contiguous in the file.
        run = block.ndim
        while run > 0 and block.shape[run - 1] == spec.shape[run - 1]:
            run -= 1
        outer = max(run - 1, 0)
        strides = [math.prod(spec.shape[i + 1 :]) * spec.itemsize for i in range(block.ndim)]
        tail = sum(s * stride for s, stride in zip(start[outer:], strides[outer:], strict=True))
        for index in np.ndindex(*block.shape[:outer]):
            offset = tail + sum((s + i) * stride for s, i, stride in zip(start, index, strides, strict=False))
            self.write(name, np.asarray(block[index]), offset)

    def _pwrite(self, shard: _Shard, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(shard.descriptor, view[done:], position + done)
            except OSError as error:
                raise CheckpointError(f"cannot write {shard.partial}: {error.strerror}") from error


class SafetensorsWriter(_SliceWriter):
    """Writes tensors of known dtype and shape into pre-sized files, any slice at any time, in any order.

    Nothing is visible until `finish`: the files lie beside their final names. The index (or the single file)
    is renamed into place last, so that an interrupted save leaves an older checkpoint in the directory
    whole. As a context manager, leaving without `finish` removes everything written.
    """

    def __init__(
        self,
        directory: str | Path,
        specs: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Creates the files. A tensor larger than `max_shard_bytes` gets a shard of its own.

        Raises CheckpointError if the directory cannot be written or the disk has too little space.
        """
        super().__init__(Path(directory), dict(specs))
        self._metadata = dict(metadata) if metadata is not None else {"format": "pt"}
        groups = _plan_shards(self._specs, max_shard_bytes)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, group in zip(self._shard_names(len(groups)), groups, strict=True):
                self._create(name, group)
        except OSError as error:
            self.abandon()
            raise CheckpointError(
                f"cannot write a checkpoint in {self.directory}: {error.strerror}"
            ) from error

    def describe(self) -> dict[str, Any]:
        """The files as plain JSON values: what a `SafetensorsHelper` in another process needs to write into them."""
        numbers = {id(shard): number for number, shard in enumerate(self._shards)}
        return {
            "directory": str(self.directory),
            "specs": {name: (spec.dtype, spec.shape) for name, spec in self._specs.items()},
            "shards": [(shard.name, str(shard.partial), shard.data_start) for shard in self._shards],
            "places": {name: (numbers[id(shard)], begin) for name, (shard, begin) in self._places.items()},
        }

    def finish(self, written: Mapping[str, int] | None = None) -> None:
        """Checks that all was written, makes the checkpoint visible and removes an older one's files.

        written: bytes of each tensor, if helpers wrote as well; by default those written here.
        Raises CheckpointError if tensors are incomplete or the disk fails; the older checkpoint then stays.
        """
        written = self._written if written is None else written
        incomplete = [name for name, spec in self._specs.items() if written[name] != spec.nbytes]
        if incomplete:
            name = incomplete[0]
            self.abandon()
            raise CheckpointError(
                f"{len(incomplete)} of {len(self._specs)} tensors are incomplete, the first is {name!r} with "
                f"{written[name]} of {self._specs[name].nbytes} bytes written"
            )
        with self._abandon_on_failure("finish"):
            self._publish()

    def abandon(self) -> None:
        """Removes what was written so far; does nothing after `finish`."""
        for shard in self._shards:
            shard.close()
            shard.partial.unlink(missing_ok=True)
        self._shards.clear()
        self._places.clear()

    @contextmanager
    def _abandon_on_failure(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon()
            raise CheckpointError(
                f"cannot {verb} the checkpoint in {self.directory}: {error.strerror}"
            ) from error
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _shard_names(self, count: int) -> list[str]:
        if count == 1:
            return [SINGLE_NAME]
        stem = "model"
        while any((self.directory / _shard_name(stem, i, count)).exists() for i in range(count)):
            # The shards of an older checkpoint stay in place until the new index is.
            stem += "-new"
        return [_shard_name(stem, i, count) for i in range(count)]

    def _create(self, name: str, group: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        offsets: dict[str, int] = {}
        for tensor in group:
            spec = self._specs[tensor]
            offsets[tensor] = offset
            offset += spec.nbytes
            header[tensor] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": [offsets[tensor], offset],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
        partial = beside(self.directory / name)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        shard = _Shard(name, partial, descriptor, 8 + len(encoded))
        self._shards.append(shard)
        os.posix_fallocate(descriptor, 0, shard.data_start + offset)
        self._pwrite(shard, memoryview(struct.pack("<Q", len(encoded)) + encoded), 0)
        self._places.update({tensor: (shard, shard.data_start + begin) for tensor, begin in offsets.items()})

    def _publish(self) -> None:
        stale = _checkpoint_files(self.directory)
        for shard in self._shards:
            os.fsync(shard.descriptor)
            shard.close()
        for shard in self._shards:
            os.replace(shard.partial, self.directory / shard.name)
        kept = {shard.name for shard in self._shards}
        if len(self._shards) > 1:
            weight_map = {name: shard.name for name, (shard, _) in self._places.items()}
            total = sum(spec.nbytes for spec in self._specs.values())
            write_json(
                self.directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
            kept.add(INDEX_NAME)
        fsync_directory(self.directory)
        self._shards.clear()
        # A single file goes before an index when reading: removing it makes the new index count.
        for name in sorted(stale - kept, key=lambda name: name != SINGLE_NAME):
            (self.directory / name).unlink(missing_ok=True)


class SafetensorsHelper(_SliceWriter):
    """Writes slices into the files of a `SafetensorsWriter` of another process, from its `describe()`.

    The maker's `finish` is given what the helpers have `written`. Raises CheckpointError if a file cannot be opened.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        specs = {
            name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in description["specs"].items()
        }
        super().__init__(Path(description["directory"]), specs)
        for name, partial, data_start in description["shards"]:
            try:
                descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                self.close()
                raise CheckpointError(
                    f"cannot open {partial} to write a checkpoint: {error.strerror}"
                ) from error
            self._shards.append(_Shard(name, Path(partial), descriptor, data_start))
        self._places = {
            tensor: (self._shards[index], begin) for tensor, (index, begin) in description["places"].items()
        }

    def sync(self) -> None:
        """Brings what was written to the disk. Raises CheckpointError if the disk fails."""
        try:
            for shard in self._shards:
                os.fsync(shard.descriptor)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint in {self.directory}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Closes the files, which stay as they are."""
        for shard in self._shards:
            shard.close()


def _as_bytes(data: memoryview | bytes | npt.NDArray[Any]) -> memoryview:
    if isinstance(data, np.ndarray):
        flat: npt.NDArray[Any] = np.ascontiguousarray(data).reshape(-1)
        return flat.view(np.uint8).data
    return memoryview(data).cast("B")


def _shard_name(stem: str, index: int, count: int) -> str:
    return f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _checkpoint_files(directory: Path) -> set[str]:
    """The names of the files of the checkpoint that is in `directory` now."""
    names = {name for name in (SINGLE_NAME, INDEX_NAME) if (directory / name).exists()}
    return names | {path.name for path in directory.glob("model-*-of-*.safetensors")}


def _plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Groups tensors, in order, into shards of at most `max_shard_bytes` (or one larger tensor)."""
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in specs:
        if specs[name].nbytes > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= specs[name].nbytes
    return groups
