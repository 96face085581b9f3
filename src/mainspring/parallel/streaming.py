"""A sharded model's weights as whole tensors, one after the other under Hugging Face's names, and their checksum.

For an engine of another layout that takes them as they come: no rank holds more than its shards and one tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from mainspring.model.checksum import digest_of_sums, sum_of_bits
from mainspring.parallel.checkpoint import rectangles_of, shape_of, writes
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.placement import hf_shapes
from mainspring.parallel.units import Piece, Units


@torch.no_grad()
def stream_weights(units: Units) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model, in the checkpoint's order and to the bit, on every rank.

    A collective iterator: all ranks go through it together, to its end. A tensor is new; nobody writes to it again.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in units.pieces:
        if writes(units, piece):
            pieces[piece.block.name].append(piece)
    world = units.mesh.group("world")
    for name, shape in hf_shapes(units.model.config).items():
        whole = torch.zeros(shape, dtype=units.model.dtype, device=units.model.device)
        for piece in pieces[name]:
            own = piece.of(piece.unit.shard)
            for start, rows in rectangles_of(piece):
                flat = own[rows]
                size = shape_of(piece, flat)
                target = whole
                for dim, (first, length) in enumerate(zip(start, size, strict=True)):
                    target = target.narrow(dim, first, length)
                target.copy_(flat.view(size))
        # One rank has each element, the others zero bits: a sum of integers leaves its bits as they are.
        all_reduce(_as_integers(whole), world)
        yield name, whole


@torch.no_grad()
def weights_checksum(units: Units) -> str:
    """That of the whole model, as an engine computes it of its own; of the ranks' parts, a collective call."""
    shapes = hf_shapes(units.model.config)
    places = {name: place for place, name in enumerate(shapes)}
    sums = torch.zeros(len(shapes), dtype=torch.int64, device=units.model.device)
    for piece in units.pieces:
        if not writes(units, piece):
            continue
        name, own = piece.block.name, piece.of(piece.unit.shard)
        width = shapes[name][1] if len(shapes[name]) > 1 else 1
        for start, rows in rectangles_of(piece):
            flat = own[rows]
            first = start[0] * width + (start[1] if len(start) > 1 else 0)
            sums[places[name]] += sum_of_bits(flat.view(shape_of(piece, flat)), first=first, width=width)
    all_reduce(sums, units.mesh.group("world"))
    dtype = units.model.dtype
    return digest_of_sums(
        (name, shapes[name], dtype, total) for name, total in zip(places, sums.tolist(), strict=True)
    )


def _as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers that every backend can add."""
    wide = math.prod(tensor.shape) * tensor.element_size() % 4 == 0
    return tensor.view(-1).view(torch.int32 if wide else torch.uint8)
