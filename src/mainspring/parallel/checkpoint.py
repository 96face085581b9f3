"""Checkpoints under any layout: each rank reads and writes the pieces it owns of Hugging Face's tensors, and no more.

The first rank makes the pre-sized files, all write into them, and it makes the whole visible once every rank has
said that its part is on the disk. No rank ever holds the model.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mainspring.errors import CheckpointError
from mainspring.formats.files import beside, exchange_directory
from mainspring.formats.safetensors_file import (
    CheckpointReader,
    SafetensorsHelper,
    SafetensorsWriter,
    TensorEntry,
    TensorSpec,
)
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.host_copies import HostCopies
from mainspring.parallel.mesh import Group
from mainspring.parallel.placement import hf_shapes
from mainspring.parallel.units import Piece, Units

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_piece(entry: TensorEntry, piece: Piece) -> Tensor:
    """The piece's elements of a stored tensor (of any float dtype), flat. Raises CheckpointError for another shape."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {entry.name!r} is stored as {entry.dtype}; {', '.join(DTYPES)} are read"
        )
    stored = torch.frombuffer(entry.data, dtype=DTYPES[entry.dtype]).view(entry.shape)
    block = piece.block
    if stored.ndim != len(block.shape) or any(
        start + size > whole
        for start, size, whole in zip(block.start, block.shape, stored.shape, strict=True)
    ):
        raise CheckpointError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}; the layout needs {block.shape} from {block.start} on"
        )
    return _flat(stored, piece)


def _flat(tensor: Tensor, piece: Piece) -> Tensor:
    """The piece's elements of the whole tensor."""
    block, stored = piece.block, tensor
    for dim, (start, size) in enumerate(zip(block.start, block.shape, strict=True)):
        stored = stored.narrow(dim, start, size)
    count = piece.end - piece.begin
    if stored.is_contiguous():
        return stored.view(-1)[piece.offset : piece.offset + count]
    width = block.shape[1]  # only the rows that hold the piece are read
    first, last = piece.offset // width, -(-(piece.offset + count) // width)
    rows = stored[first:last].reshape(-1)
    return rows[piece.offset - first * width :][:count]


def load_weights(units: Units, directory: str | Path) -> None:
    """Fills the rank's shards from a checkpoint and brings the parameters up to date.

    Raises CheckpointError on a tensor that is missing, unknown or of another shape.
    """
    reader = CheckpointReader(directory)
    check_names(reader, hf_shapes(units.model.config), tied=units.model.config.tie_word_embeddings)
    with torch.no_grad():
        for piece in units.pieces:
            piece.of(piece.unit.shard).copy_(read_piece(reader.entry(piece.block.name), piece))
    units.refresh()


def fill_weights(units: Units, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """As `load_weights`, from whole tensors that come one by one under Hugging Face's names."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in units.pieces:
        pieces[piece.block.name].append(piece)
    with torch.no_grad():
        for name, tensor in tensors:
            for piece in pieces[name]:
                piece.of(piece.unit.shard).copy_(_flat(tensor, piece))
    units.refresh()


def check_names(
    reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]], *, tied: bool = False
) -> None:
    """Raises CheckpointError unless the checkpoint has exactly these tensors."""
    names = set(reader.names())
    missing = sorted(set(shapes) - names)
    if missing:
        raise CheckpointError(
            f"{reader.path} lacks {len(missing)} of {len(shapes)} tensors; the first is {missing[0]!r}"
        )
    for name in sorted(names - set(shapes)):
        if not name.endswith(".inv_freq") and not (tied and name == "lm_head.weight"):
            raise CheckpointError(f"{reader.path} has a tensor {name!r} that the model does not account for")
    for name, shape in shapes.items():
        if reader.spec(name).shape != shape:
            raise CheckpointError(
                f"tensor {name!r} of {reader.path} has shape {list(reader.spec(name).shape)}, "
                f"the model needs {list(shape)}"
            )


@dataclass(frozen=True)
class Stored:
    """What goes into a file: for every tensor its spec, and for this rank the pieces of it with their values.

    whole: small tensors that every rank has and the first one writes.
    """

    specs: Mapping[str, TensorSpec]
    pieces: Sequence[tuple[str, Piece, Callable[[], Tensor]]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)


def stored_weights(units: Units) -> Stored:
    """The model's weights, in the parameters' dtype."""
    code = NAMES[units.model.dtype]
    specs = {name: TensorSpec(code, shape) for name, shape in hf_shapes(units.model.config).items()}
    return Stored(
        specs,
        [(p.block.name, p, lambda p=p: p.of(p.unit.shard)) for p in units.pieces],  # type: ignore[misc]  # a lambda's default has no type
    )


def writes(units: Units, piece: Piece) -> bool:
    """Whether this rank writes a piece that several ranks hold."""
    block, mesh = piece.block, units.mesh
    if piece.unit.copy_group.rank:
        return False
    if block.holders is not None and mesh.group(block.holders).rank:
        return False
    return block.parameter != "embedding" or mesh.group("tied").rank == 0


def held(stored: Stored, units: Units, kind: str, copies: HostCopies | None) -> Stored:
    """The part that this rank writes; with `copies` its values of this moment, else those that it has when written."""
    pieces: list[tuple[str, Piece, Callable[[], Tensor]]] = []
    for number, (name, piece, value) in enumerate(stored.pieces):
        if writes(units, piece):
            if copies is not None:
                copy = copies.copy(f"{kind}.{number}", value())
                value = lambda copy=copy: copy  # type: ignore[misc]  # a lambda's default has no type  # noqa: E731
            pieces.append((name, piece, value))
    return Stored(stored.specs, pieces, stored.whole)


def write_together(directory: Path, stored: Stored, units: Units, world: Group | None = None) -> None:
    """Writes the files of `stored` in an existing directory; a collective call. They are visible when it returns.

    world: all ranks; a group of its own where a thread writes while the ranks compute.
    Raises CheckpointError on every rank if any fails; the files are then gone.
    """
    world = world if world is not None else units.mesh.group("world")
    device = _device_of(world)
    with agreed(world, f"write {directory}"):
        writer = SafetensorsWriter(directory, stored.specs) if world.rank == 0 else None
    description = share_json(writer.describe() if writer is not None else None, world, device)
    try:
        with agreed(world, f"write {directory}"):
            helper = writer if writer is not None else SafetensorsHelper(description)
            for name, piece, value in stored.pieces:
                units.mesh.monitor.progress()
                if writes(units, piece):
                    for start, rows in rectangles_of(piece):
                        flat = value().detach()[rows].cpu().contiguous()
                        helper.write_block(name, _numpy(flat).reshape(shape_of(piece, flat)), start)
            for name, tensor in stored.whole.items() if writer is not None else ():
                helper.write(name, tensor.cpu().contiguous().numpy())
            if isinstance(helper, SafetensorsHelper):
                helper.sync()
                helper.close()
        names = list(stored.specs)
        counts = torch.tensor([helper.written[name] for name in names], dtype=torch.int64, device=device)
        counts = all_reduce(counts, world)
        with agreed(world, f"finish {directory}"):
            if writer is not None:
                writer.finish(dict(zip(names, counts.tolist(), strict=True)))
    finally:
        if writer is not None:
            writer.abandon()


def rectangles_of(piece: Piece) -> Iterator[tuple[tuple[int, ...], slice]]:
    """The piece as at most three rectangles of its tensor: (where it begins, which of the piece's elements)."""
    block, count = piece.block, piece.end - piece.begin
    if len(block.shape) == 1:
        yield (block.start[0] + piece.offset,), slice(0, count)
        return
    width, at = block.shape[1], piece.offset
    end = at + count
    while at < end:
        row, column = divmod(at, width)
        # A part of a row up to its end, then whole rows, then the beginning of a row.
        stop = min(end, (row + 1) * width) if column or end - at < width else end - end % width
        yield (block.start[0] + row, block.start[1] + column), slice(at - piece.offset, stop - piece.offset)
        at = stop


def shape_of(piece: Piece, flat: Tensor) -> tuple[int, ...]:
    """The shape of one of the rectangles of `rectangles_of`, from its elements."""
    if len(piece.block.shape) == 1:
        return (flat.shape[0],)
    width = piece.block.shape[1]
    return (1, flat.shape[0]) if flat.shape[0] < width else (flat.shape[0] // width, width)


def _numpy(flat: Tensor) -> np.ndarray[Any, Any]:
    if flat.dtype is torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    return flat.numpy()


@contextmanager
def agreed(world: Group, what: str) -> Iterator[None]:
    """What one rank cannot do, none does: an error on any rank becomes a CheckpointError on all, none waits in vain."""
    failure: Exception | None = None
    try:
        yield
    except (CheckpointError, OSError) as error:
        failure = error
    flags = torch.zeros(world.size, dtype=torch.int64)
    flags[world.rank] = failure is not None
    device = _device_of(world)
    failed = [i for i, flag in enumerate(all_reduce(flags.to(device), world).tolist()) if flag]
    if failure is not None:
        raise CheckpointError(f"cannot {what}: {failure}") from failure
    if failed:
        raise CheckpointError(
            f"cannot {what}: rank {failed[0]} failed, its message says why; nothing was changed"
        )


def share_json(value: Any, world: Group, device: torch.device) -> Any:
    """The first rank's value on all ranks, as JSON in a tensor (nothing is pickled)."""
    if world.size == 1:
        return value
    encoded = json.dumps(value).encode() if world.rank == 0 else b""
    size = all_reduce(torch.tensor([len(encoded)], device=device), world)
    data = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if world.rank == 0:
        data.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    return json.loads(bytes(all_reduce(data, world).cpu().numpy()))


@contextmanager
def shared_directory(path: Path, world: Group) -> Iterator[Path]:
    """As `formats.files.replaced_directory`, for all ranks: it becomes `path` once each has said that it is done."""
    partial = beside(path)
    with agreed(world, f"make {path}"):
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
    partial = Path(share_json(str(partial), world, _device_of(world)))
    try:
        yield partial
        with agreed(world, f"publish {path}"):
            if world.rank == 0:
                exchange_directory(partial, path)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _device_of(world: Group) -> torch.device:
    if world.handle is not None and dist.get_backend(world.handle) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
