"""Tensors in safetensors files, by the readers and writers of `mainspring.formats`: mapped, checked, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mainspring.errors import CheckpointError
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter, TensorSpec
from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor, dtype

_NAMES: tuple[tuple[str, dtype], ...] = (
    ("BOOL", mt.bool),
    ("U8", mt.uint8),
    ("I8", mt.int8),
    ("I16", mt.int16),
    ("I32", mt.int32),
    ("I64", mt.int64),
    ("F16", mt.float16),
    ("BF16", mt.bfloat16),
    ("F32", mt.float32),
    ("F64", mt.float64),
)


def load_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a directory with one or with shards and an index.

    They lie on the mapped file: nothing is read before it is used, and what is written to them stays in memory.

    Raises:
        CheckpointError: no such file, a damaged one, or a dtype that is not ours.
    """
    reader = CheckpointReader(path)
    return {name: load_tensor(reader, name) for name in reader.names()}


def load_tensor(reader: CheckpointReader, name: str) -> Tensor:
    """One tensor of a checkpoint on its mapped memory."""
    entry = reader.entry(name)
    kind = next((t for stored, t in _NAMES if stored == entry.dtype), None)
    if kind is None:
        raise CheckpointError(
            f"tensor {name!r} has the dtype {entry.dtype}, which mainspring.tensor does not know"
        )
    if not entry.data.nbytes:
        return mt.empty(entry.shape, dtype=kind)
    return mt.frombuffer(entry.data, kind, entry.shape)


def save_file(tensors: Mapping[str, Tensor], directory: str | Path) -> None:
    """Writes tensors as `model.safetensors` (and shards of it, if large) into a directory, whole or not at all.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    specs = {
        name: TensorSpec(next(stored for stored, t in _NAMES if t is tensor.dtype), tensor.shape)
        for name, tensor in tensors.items()
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(Path(directory), specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _bytes(tensor.detach().contiguous()))
        writer.finish()


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    if tensor.dtype is mt.bfloat16:
        tensor = mt.bit_view(tensor, mt.int16)
    return memoryview(tensor.reshape(-1)).cast("B")
