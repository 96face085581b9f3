"""A worker rank: does to its part of the model and of the cache what rank 0 says. It knows no request.

`python -m mainspring.engine.ranks.worker RANK WORLD cpu|cuda STORE` is started by `RankGroup`; under torchrun
`mainspring serve` calls `work` on every rank but the first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mainspring.engine.parent_watch import end_with_parent
from mainspring.engine.ranks.adapters import ShardAdapters
from mainspring.engine.ranks.channel import Channel, Message, Op
from mainspring.engine.ranks.group import control_channel, join, on_this_machine
from mainspring.engine.ranks.shard import Shard, copy_blocks, packed_pieces
from mainspring.engine.ranks.weights import checksum, copy_weight, draw_shard, load_shard
from mainspring.formats.model_config import ModelConfig
from mainspring.model.initialise import torch_dtype
from mainspring.ops import Policy
from mainspring.ops.batch import TokenBatch
from mainspring.ops.threads import set_num_threads
from mainspring.parallel.checkpoint import agreed
from mainspring.parallel.collectives import all_reduce_max
from mainspring.parallel.launch import local_device
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh

log = logging.getLogger(__name__)


def build_shard(order: dict[str, Any], device: torch.device) -> Shard:
    """The rank's part of the model that a LOAD order names; a collective call of all ranks.

    Raises:
        CheckpointError: any rank cannot read its part; then all raise.
    """
    layout = Layout.parse(order["layout"])
    config = ModelConfig.from_file(Path(order["directory"]) / "config.json")
    policy = Policy(order["numerics"])
    if order["num_threads"] is not None:
        set_num_threads(order["num_threads"])
    with on_this_machine():
        mesh = (
            Mesh.build(layout.axes, key_copies=layout.key_copies(config))
            if layout.world > 1
            else Mesh.single()
        )
        with agreed(mesh.group("world"), f"load {order['directory']}"):
            dtype = torch_dtype(order["dtype"])
            fill = draw_shard if order["random_weights"] else load_shard
            model = fill(order["directory"], layout, mesh, device=device, dtype=dtype, policy=policy)
    return Shard(model, order["piece_tokens"])


class Worker:
    """Carries out orders until STOP."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel = channel
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None
        self._tickets: Tensor | None = None

    @torch.inference_mode()
    def run(self) -> None:
        """Raises RuntimeError if another rank is gone."""
        first = self._channel.receive()
        if first.op is not Op.LOAD:
            return  # rank 0 gave up before it began
        shard = build_shard(first.value, self._device)
        while True:
            message = self._channel.receive()
            match message.op:
                case Op.FORWARD if message.words[0]:
                    self._capture(shard, message)
                case Op.FORWARD:
                    self._forward(shard, message)
                case Op.LOGITS:
                    self._logits(shard, message)
                case Op.REPLAY:
                    self._graphs[message.words[0]].replay()
                case Op.COPY_BLOCKS:
                    assert shard.cache is not None  # rank 0 has one
                    copy_blocks(shard.cache, torch.tensor(message.words, device=self._device).view(-1, 2))
                case Op.ALLOCATE:
                    num_blocks, block_size, dtype = message.value
                    shard.cache = shard.cache_shape.allocate(
                        num_blocks, block_size, getattr(torch, dtype), self._device
                    )
                case Op.FREE:
                    shard.cache, self._graphs, self._pool = None, [], None
                    if self._device.type == "cuda":
                        torch.cuda.empty_cache()
                case Op.FREE_MEMORY:
                    free_memory(shard)
                case Op.COPY_WEIGHT:
                    name, shape, dtype = message.value
                    whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
                    copy_weight(shard.model, shard.parameters, name, shard.broadcast(whole))
                case Op.ADAPTERS:
                    shard.adapters = ShardAdapters(shard.model, message.value)
                case Op.SCORE:
                    shard.model.log_probs(*message.value)
                case Op.CHECKSUM:
                    checksum(shard.model, shard.parameters)
                case Op.STOP | Op.LOAD:
                    return

    def _forward(self, shard: Shard, message: Message) -> None:
        _, num_tokens, num_sequences, width, num_adapted, num_tickets, *host = message.words
        lengths, contexts, rope_lengths = (
            tuple(host[n * num_sequences : (n + 1) * num_sequences]) for n in range(3)
        )
        shape = (num_tokens, num_sequences, width, num_adapted)
        packed = torch.empty(packed_pieces(None, *shape)[0], dtype=torch.int32, device=self._device)
        _, pieces = packed_pieces(shard.broadcast(packed), *shape)
        tokens, positions, slots, boundaries, context_lens, tables, lora_ids = pieces
        adapters = None
        if num_adapted:
            assert shard.adapters is not None  # rank 0 has them too
            adapters = shard.adapters.of_batch(lora_ids.to(torch.int64))
        if num_tickets and (self._tickets is None or self._tickets.numel() < num_tickets):
            self._tickets = torch.zeros(num_tickets, dtype=torch.int32, device=self._device)
        batch = TokenBatch(
            positions=positions.to(torch.int64),
            cu_seqlens=boundaries,
            context_lens=context_lens,
            lengths=lengths,
            contexts=contexts,
            rope_lengths=rope_lengths,
            cache=shard.cache,
            slots=slots.to(torch.int64),
            block_tables=tables.view(num_sequences, width),
            adapters=adapters,
            tickets=self._tickets if num_tickets else None,
        )
        shard.forward(tokens.to(torch.int64), batch)

    def _logits(self, shard: Shard, message: Message) -> None:
        shape = (message.words[0], shard.config.hidden_size)
        shard.logits(torch.empty(shape, dtype=shard.model.dtype, device=self._device))

    def _capture(self, shard: Shard, message: Message) -> None:
        """Rank 0 captures a step: a forward pass and the logits of its rows."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._forward(shard, message)
            self._logits(shard, self._channel.receive())
        self._graphs.append(graph)


def free_memory(shard: Shard) -> int:
    """The least free device memory of all ranks, in bytes; a collective call."""
    free, _ = torch.cuda.mem_get_info(shard.device)
    taken = torch.tensor([-free], dtype=torch.int64, device=shard.device)
    return -int(all_reduce_max(taken, shard.mesh.group("world")))


def work(kind: str) -> None:
    """What a rank that torchrun has started does: joins, works, and leaves when rank 0 stops."""
    # torchrun signals all its ranks; rank 0 finishes what runs, and needs the others for it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    join(0, 0, kind, None)
    Worker(control_channel(), local_device(kind)).run()
    dist.destroy_process_group()


def main(rank: int, world: int, kind: str, store: Path) -> int:
    """Runs a worker of `RankGroup`; returns its exit status."""
    end_with_parent(store.parent)
    join(world, rank, kind, store)
    try:
        device = torch.device("cuda", rank) if kind == "cuda" else torch.device(kind)
        Worker(control_channel(), device).run()
        dist.destroy_process_group()
        return 0
    except Exception:
        log.exception("Rank %d ends because of an error", rank)
        # Not by returning: the group's own threads wait for ranks that may be gone.
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="engine: %(levelname)s %(message)s")
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
