"""A rank's part of the model and of the cache. Every rank makes the same calls in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mainspring.model.layers import DecoderLayer, MixtureOfExperts
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.parallel.collectives import gather_rows, start_receive, start_send
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.experts import ParallelExperts
from mainspring.parallel.mesh import Group, even_bounds

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


def packed_pieces(packed: Tensor | None, tokens: int, sequences: int, width: int) -> tuple[int, list[Tensor]]:
    """How long the packed int32 tensor of a step is, and its pieces: tokens, positions and slots of each token, the
    boundaries of the sequences, their context lengths, and their block tables. Each is aligned like a tensor."""
    sizes = (tokens, tokens, tokens, sequences + 1, sequences, sequences * width)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    if packed is None:
        return starts[-1], []
    return starts[-1], [packed[start : start + size] for start, size in zip(starts, sizes, strict=False)]


class Shard:
    """One rank of one layout. Rank 0 is the first stage's first rank, and alone needs results."""

    def __init__(self, model: ParallelDecoder) -> None:
        self.model = model
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
        x = tokens
        if self.stage:
            before = self.mesh.edge(self.stage - 1, self.stage)
            like = torch.empty(
                (batch.num_tokens, self.config.hidden_size), dtype=self.model.dtype, device=self.device
            )
            x = start_receive(like, 0, before).wait()
        x = self.model.run_stage(self.stage, x, batch)
        if not self.is_last:
            start_send(x, 1, self.mesh.edge(self.stage, self.stage + 1)).wait()
        return self._brought_back(x, self.config.hidden_size, self.model.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: rank 0's [N, H], of one size on all ranks -> [N, V] float32 on rank 0, contiguous."""
        self.broadcast(hidden)
        logits = self.model.logits(hidden).contiguous() if self.is_last else hidden
        return self._brought_back(logits, self.config.vocab_size, torch.float32)

    def _brought_back(self, x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The last stage's x [N, width] on rank 0, from that stage's first rank."""
        if self.last_stage and self.mesh.rank == self._home(self.last_stage):
            start_send(x, 1, self.mesh.edge(self.last_stage, 0)).wait()
        elif self.last_stage and self.mesh.rank == 0:
            like = torch.empty((x.shape[0], width), dtype=dtype, device=self.device)
            return start_receive(like, 0, self.mesh.edge(self.last_stage, 0)).wait()
        return x

    def _home(self, stage: int) -> int:
        """The stage's rank with rank 0's other coordinates."""
        return self.mesh.axes.rank(pp=stage)


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
