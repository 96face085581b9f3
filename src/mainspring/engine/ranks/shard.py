"""A rank's part of the model and of the cache. Every rank makes the same calls in the same order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mainspring.engine.ranks.adapters import ShardAdapters, ShardBatchAdapters
from mainspring.engine.ranks.cutting import cut_batch, piece_bounds
from mainspring.model.layers import DecoderLayer, Linear, MixtureOfExperts
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.parallel.collectives import Pending, gather_rows, start_receive, start_send
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.experts import ParallelExperts
from mainspring.parallel.mesh import Group, even_bounds
from mainspring.parallel.tensor import ColumnParallelLinear, RowParallelLinear

_CPU_PIECE, _GPU_PIECE = 64, 1024
_ALIGNMENT = 64  # elements of int32: kernels are compiled for what an allocation's address is divisible by


@dataclass(frozen=True)
class CacheShape:
    """What of keys and values one process holds: of the layers of its stage, of its heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def row_bytes(self, itemsize: int) -> int:
        """Bytes of the keys of one token in one layer; its values take as many."""
        return self.num_kv_heads * self.head_dim * itemsize

    def allocate(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """A cache of num_blocks usable blocks, and the null block."""
        return KVCache.allocate(
            self.num_layers, num_blocks + 1, block_size, self.num_kv_heads, self.head_dim, dtype, device
        )


def copy_blocks(cache: KVCache, pairs: Tensor) -> None:
    """pairs: [N, 2] int64 on the cache's device, (from, to)."""
    for tensor in (*cache.k, *cache.v):
        blocks = tensor.view(torch.uint8)  # byte by byte: torch indexes no fp8
        blocks[pairs[:, 1]] = blocks[pairs[:, 0]]


def packed_pieces(
    packed: Tensor | None, tokens: int, sequences: int, width: int, adapted: int
) -> tuple[int, list[Tensor]]:
    """How long the packed int32 tensor of a step is, and its pieces: tokens, positions and slots of each token, the
    boundaries of the sequences, their context lengths, their block tables, and the adapters of `adapted` tokens (all or
    none). Each is aligned like a tensor."""
    sizes = (tokens, tokens, tokens, sequences + 1, sequences, sequences * width, adapted)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    if packed is None:
        return starts[-1], []
    return starts[-1], [packed[start : start + size] for start, size in zip(starts, sizes, strict=False)]


class Shard:
    """One rank of one layout. Rank 0 is the first stage's first rank, and alone needs results."""

    def __init__(self, model: ParallelDecoder, piece_tokens: int | None = None) -> None:
        """piece_tokens: see `piece_bounds`; None: 64 on a CPU, 1,024 on a GPU."""
        self.model = model
        default = _GPU_PIECE if model.device.type == "cuda" else _CPU_PIECE
        self.piece_tokens = default if piece_tokens is None else piece_tokens
        self.layout, self.mesh, self.config = model.layout, model.mesh, model.config
        self.stage = self.mesh.index["pp"]
        self.last_stage = self.layout.pp - 1
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        layers = model.stage_layers
        # Attention asks the cache for its layer: here, one of the rank's own.
        for place, number in enumerate(layers[self.stage]):
            layer = cast(DecoderLayer, model.layers[str(number)])
            layer.attention.layer = place
            if self.layout.ep > 1 and isinstance(layer.mlp, ParallelExperts):
                layer.mlp = cast(MixtureOfExperts, SharedExperts(layer.mlp, self.mesh.group("ep")))
        heads = max(1, self.config.num_kv_heads // self.layout.tp)
        self.cache_shape = CacheShape(len(layers[self.stage]), heads, self.config.head_dim)
        self.largest_cache_shape = CacheShape(max(map(len, layers)), heads, self.config.head_dim)
        self.cache: KVCache | None = None
        self.adapters: ShardAdapters | None = None
        for name, module in model.named_modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                cast(Linear, module).name = name  # by which adapters know it

    @property
    def is_last(self) -> bool:
        """The rank's stage ends in the logits."""
        return self.stage == self.last_stage

    @property
    def device(self) -> torch.device:
        return self.model.device

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on all ranks, in x itself (contiguous). Bytes: whatever the dtype."""
        if self.layout.world > 1:
            group = self.mesh.group("world")
            group.monitor.enter("broadcast", group.name, group.ranks, x.numel() * x.element_size())
            dist.broadcast(x.view(torch.uint8), src=0, group=group.handle)
            group.monitor.leave()
        return x

    def forward(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """tokens: [T] int64 -> hidden states after the final norm [T, H], on rank 0 and on the last stage's ranks.

        (On others what their stage gives.)
        """
        bounds = piece_bounds(batch.num_tokens, self.layout.pp, self.piece_tokens)
        cuts = list(pairwise(bounds))
        given = self._received(cuts, self.stage - 1, self.stage) if self.stage else []
        results: list[Tensor] = []
        sent: list[Pending] = []
        for number, (begin, end) in enumerate(cuts):
            x = given[number].wait() if self.stage else tokens[begin:end]
            x = self.model.run_stage(self.stage, x, self._cut(batch, begin, end))
            results.append(x)
            if not self.is_last:
                sent.append(start_send(x, 1, self.mesh.edge(self.stage, self.stage + 1), number))
            elif self._leads_last_stage:
                sent.append(start_send(x, 1, self.mesh.edge(self.stage, 0), number))
        if self.last_stage and self.mesh.rank == 0:
            results = [piece.wait() for piece in self._received(cuts, self.last_stage, 0)]
        for work in sent:
            work.wait()
        return results[0] if len(results) == 1 else torch.cat(results)

    def _cut(self, batch: TokenBatch, begin: int, end: int) -> TokenBatch:
        piece = cut_batch(batch, begin, end)
        if isinstance(piece.adapters, ShardBatchAdapters) and piece is not batch:
            assert self.adapters is not None  # the batch's are made by them
            adapters = self.adapters.of_batch(piece.adapters.lora_ids[begin:end])
            piece = dataclasses.replace(piece, adapters=adapters)
        return piece

    def _received(self, cuts: Sequence[tuple[int, int]], source: int, to: int) -> list[Pending]:
        """The pieces of the stream, or of the hidden states, that are to come from another stage."""
        edge = self.mesh.edge(source, to)
        shapes = ((end - begin, self.config.hidden_size) for begin, end in cuts)
        places = [torch.empty(shape, dtype=self.model.dtype, device=self.device) for shape in shapes]
        return [start_receive(place, 0, edge, number) for number, place in enumerate(places)]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: rank 0's [N, H], of one size on all ranks -> [N, V] float32 on rank 0, contiguous."""
        self.broadcast(hidden)
        logits = self.model.logits(hidden).contiguous() if self.is_last else hidden
        return self._brought_back(logits, self.config.vocab_size, torch.float32)

    def _brought_back(self, x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The last stage's x [N, width] on rank 0, from that stage's first rank."""
        if self._leads_last_stage:
            start_send(x, 1, self.mesh.edge(self.last_stage, 0)).wait()
        elif self.last_stage and self.mesh.rank == 0:
            like = torch.empty((x.shape[0], width), dtype=dtype, device=self.device)
            return start_receive(like, 0, self.mesh.edge(self.last_stage, 0)).wait()
        return x

    @property
    def _leads_last_stage(self) -> bool:
        """There is more than one stage, and this is the last one's rank with rank 0's other coordinates."""
        return self.last_stage > 0 and self.mesh.rank == self.mesh.axes.rank(pp=self.last_stage)


class SharedExperts(nn.Module):
    """Experts spread over ranks that all have the same tokens: each sends its share of the rows, and all get all.

    A row's experts give the same bits wherever it is sent from, so this is one device's block to the bit (in
    lockstep).
    """

    def __init__(self, experts: ParallelExperts, group: Group) -> None:
        super().__init__()
        self.experts, self.group = experts, group

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H], the same on every rank -> the same shape, the same on every rank."""
        total, size, rank = x.shape[0], self.group.size, self.group.rank
        if total < size:  # every rank must have a row to route
            x = torch.cat([x, x.new_zeros(size - total, x.shape[1])])
        bounds = even_bounds(x.shape[0], size)
        own: Tensor = self.experts(x[bounds[rank] : bounds[rank + 1]])
        return gather_rows(own, x.shape[0], self.group)[:total]
