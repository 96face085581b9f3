"""Muon under a layout: momentum on shards, orthogonalisation of whole matrices split over the ranks.

Momentum and the weights' update are elementwise, so each rank does them on its shard. In between an update must be a
whole matrix: the ranks that hold its parts send them, in the dtype in which it is orthogonalised, to one of them (of
equal shapes each rank gets as many), which orthogonalises and sends the result back. (Jordan et al., 2024; the
distribution is that of Liu et al., arXiv 2502.16982, section 2.3, with more ranks than one at work.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mainspring.model.naming import parts
from mainspring.ops.muon import MuonSettings, orthogonalise
from mainspring.parallel.checkpoint import rectangles_of, shape_of
from mainspring.parallel.collectives import start_gather_flat, start_reduce_scatter_flat
from mainspring.parallel.placement import hf_shapes, parameters_of_rank
from mainspring.parallel.units import Piece, Units

_EXCHANGED = torch.bfloat16
_WORKSPACE = 1 << 28
"""Bytes of whole matrices that a rank holds at a time."""


class ShardedMuon:
    """masters: by unit, the rank's shard of what is moved. parameters: names of those that Muon moves.

    `momenta` holds the momentum of each of `pieces`.
    """

    def __init__(
        self, units: Units, masters: Mapping[str, Tensor], parameters: set[str], settings: MuonSettings
    ) -> None:
        self._units, self._settings = units, settings
        self._masters = masters
        self._group = units.mesh.group("holders")
        self.pieces = [piece for piece in units.pieces if piece.block.parameter in parameters]
        self.momenta = [torch.zeros_like(piece.of(masters[piece.unit.name])) for piece in self.pieces]
        self._pieces_of: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            self._pieces_of[piece.block.name].append(piece)
        # The same list on all ranks of the group, whatever of it they hold: those of their stages.
        shapes = hf_shapes(units.model.config)
        held = parameters_of_rank(units.model.config, units.layout, units.mesh) & parameters
        owned = {part.name for part in parts(units.model.config) if part.parameter in held}
        self._by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in shapes:
            if name in owned:
                self._by_shape[shapes[name]].append(name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the units' summed gradients."""
        s = self._settings
        updates: dict[int, Tensor] = {}
        for piece, momentum in zip(self.pieces, self.momenta, strict=True):
            gradient = self._units.gradient(piece).to(momentum.device, torch.float32)
            momentum.lerp_(gradient, 1.0 - s.momentum)
            updates[id(piece)] = gradient.lerp(momentum, s.momentum) if s.nesterov else momentum.clone()
        for shape, names in self._by_shape.items():
            rows, columns = shape
            for chunk in self._chunks(names, rows * columns):
                self._orthogonalise(chunk, shape, updates)
            scale = s.scale(rows, columns)
            for piece in (piece for name in names for piece in self._pieces_of[name]):
                master = piece.of(self._masters[piece.unit.name])
                master.mul_(1.0 - lr * s.weight_decay)
                master.sub_(updates[id(piece)] * (lr * scale))

    def _chunks(self, names: list[str], size: int) -> Iterator[list[str]]:
        """As many matrices at a time as the workspace holds, a multiple of the ranks."""
        ranks = self._group.size
        count = max(1, _WORKSPACE // (size * 2 * ranks)) * ranks
        for first in range(0, len(names), count):
            yield names[first : first + count]

    def _orthogonalise(self, names: list[str], shape: tuple[int, ...], updates: dict[int, Tensor]) -> None:
        """Replaces the updates of the matrices' pieces by those of the orthogonalised matrices."""
        group = self._group
        each = math.ceil(len(names) / group.size)
        device = self._units.model.device
        whole = torch.zeros(each * group.size, *shape, dtype=_EXCHANGED, device=device)
        for matrix, name in zip(whole, names, strict=False):
            for piece in self._pieces_of[name]:
                if self._contributes(piece):
                    for (row, column), part in rectangles_of(piece):
                        block = updates[id(piece)][part]
                        height, width = shape_of(piece, block)
                        matrix[row : row + height, column : column + width] = block.view(height, width)
        # Each element has one contributor: the sum changes no bit.
        mine = start_reduce_scatter_flat(whole.view(-1), group).wait().view(each, *shape)
        mine = orthogonalise(mine, self._settings.newton_schulz).contiguous()
        start_gather_flat(whole.view(-1), mine.view(-1), group).wait()
        for matrix, name in zip(whole, names, strict=False):
            for piece in self._pieces_of[name]:
                blocks = []
                for (row, column), part in rectangles_of(piece):
                    height, width = shape_of(piece, updates[id(piece)][part])
                    blocks.append(matrix[row : row + height, column : column + width].reshape(-1))
                updates[id(piece)] = torch.cat(blocks).to(updates[id(piece)].device)

    def _contributes(self, piece: Piece) -> bool:
        """Whether this rank is the one of the group that sends a piece which several hold."""
        block, mesh = piece.block, self._units.mesh
        if block.holders is not None and mesh.group(block.holders).rank:
            return False
        if piece.unit.zero:
            return True  # shards are disjoint
        return mesh.group("expert_shard" if block.expert is not None else "shard").rank == 0
