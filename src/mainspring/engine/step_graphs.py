"""Steps of any kind (prompt chunks, decodes, drafts) in fixed sizes, replayed from CUDA graphs.

Launching a forward pass from Python takes longer than a GPU needs for some thousand tokens of a small model. A step is
padded to a fixed number of tokens and of sequences: further tokens belong to no sequence and are computed for nothing,
further sequences are empty. The attention kernels read all lengths on the device. In lockstep a row's bits do not
depend on what stands beside it, so padding changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.engine.decode_graphs import DecodeGraphs, DecodeRows, unowned
from mainspring.engine.hooks import Sampler
from mainspring.engine.seats import SeatTables
from mainspring.engine.served_model import ServedModel, announcement
from mainspring.engine.step_input import StepArrays
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.ops.paged_attention import reads_lengths_on_the_device

_SMALLEST = 16
_FINE_FROM = 512
# Padding may cost the GPU so long, at this speed; more, and the host launches the step as it is.
_PADDING_SECONDS = 0.01
_OPERATIONS_PER_SECOND = 6e14


@dataclass(slots=True)
class _Size:
    """A size's inputs, one after the other in one tensor, its outputs, and the graph between them."""

    inputs: Tensor
    graph: torch.cuda.CUDAGraph
    announce: Callable[[], None]  # before each replay, to the other ranks of a layout
    logits: Tensor  # [S, V] float32
    tokens: Tensor  # [S] int64
    seats: Tensor  # [S] int64
    positions: Tensor  # [S] int64


class StepGraphs:
    """Captured as the sizes are first needed. All graphs, those of decode steps too, share one pool of memory."""

    def __init__(
        self,
        model: ServedModel,
        tables: SeatTables,
        sampler: Sampler,
        cache: KVCache,
        max_model_len: int,
        max_num_tokens: int,
        decodes: DecodeGraphs,
    ) -> None:
        """decodes: the graphs whose memory these share."""
        self._model = model
        self._tables = tables
        self._sampler = sampler
        self._cache = cache
        self._max_model_len = max_model_len
        self._numbers = sizes_up_to(max_num_tokens)
        self._pool = decodes.pool
        self._stream = torch.cuda.Stream()
        self._sizes: dict[int, _Size] = {}
        self._tickets = torch.zeros(
            tables.dummy * model.config.num_heads, dtype=torch.int32, device=model.device
        )
        parameters = sum(p.numel() for p in model.parameters()) - model.embedding.numel()
        self._most_padding = int(_PADDING_SECONDS * _OPERATIONS_PER_SECOND / (2 * parameters))

    @staticmethod
    def serves(model: ServedModel, cache: KVCache) -> bool:
        """Whether this model's attention reads lengths where a graph can change them.

        Not with experts: what attention leaves for tokens of no sequence is undefined, and would be routed.
        """
        config = model.config
        if model.device.type != "cuda" or any(config.moe_layers):
            return False
        group = config.num_heads // config.num_kv_heads
        return reads_lengths_on_the_device(cache, config.head_dim, group, model.dtype, model.policy)

    def size_of(self, step: StepArrays) -> int | None:
        """The size that such a step runs in, or None if padding it costs more than launching it."""
        count, rows = len(step.positions), max(len(step.sample_rows), len(step.seats))
        place = bisect_left(self._numbers, max(count, rows))
        if place == len(self._numbers) or rows > self._tables.dummy:
            return None
        size = self._numbers[place]
        return size if size - count <= self._most_padding else None

    def run(self, step: StepArrays, size: int) -> DecodeRows:
        """A step that fits the size, whose new tokens and blocks are in the tables. Its R rows, until the next step."""
        if size not in self._sizes:
            self._sizes[size] = self._capture(size)
        graph = self._sizes[size]
        arrays = step.padded(size, self._rows(size), self._tables.dummy)
        pinned = torch.empty(graph.inputs.numel(), dtype=torch.int64, pin_memory=True)
        torch.cat([torch.from_numpy(array) for array in arrays], out=pinned)
        graph.inputs.copy_(pinned, non_blocking=True)
        graph.announce()
        graph.graph.replay()
        count = len(step.sample_rows)
        return DecodeRows(
            graph.logits[:count], graph.tokens[:count], graph.seats[:count], graph.positions[:count]
        )

    def _rows(self, size: int) -> int:
        return min(size, self._tables.dummy)

    @torch.inference_mode()
    def _capture(self, size: int) -> _Size:
        rows = self._rows(size)
        inputs = torch.zeros(2 * size + 6 * rows + 1, dtype=torch.int64, device=self._model.device)
        inputs[:size] = self._tables.dummy
        parts = inputs.split([size, size, rows, rows, rows + 1, rows, rows, rows])
        for place in (2, 6):
            parts[place].fill_(self._tables.dummy)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._run(parts)  # compiles and loads what a capture could not
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            logits, tokens = self._run(parts)
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Size(inputs, graph, announcement(self._model), unowned(logits), tokens, parts[6], parts[7])

    def _run(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(logits, sampled tokens) of a step made of `StepArrays.padded`."""
        token_seats, positions, seats, contexts, boundaries, sample_rows, sample_seats, sample_positions = (
            parts
        )
        tables, longest = self._tables, self._max_model_len
        size, rows = len(positions), len(seats)
        batch = TokenBatch(
            positions=positions,
            cu_seqlens=boundaries.to(torch.int32),
            context_lens=contexts.to(torch.int32),
            # Bounds: a sequence of one token and one of all, so that both kinds of kernels are launched.
            lengths=(1, size) + (0,) * (rows - 2),
            contexts=(longest,) * rows,
            rope_lengths=(1,) * rows,  # where it matters the step is none of these
            cache=self._cache,
            slots=tables.slots(token_seats, positions),
            block_tables=tables.block_tables(seats, -(-longest // tables.block_size)),
            tickets=self._tickets,
        )
        hidden = self._model(tables.read_tokens(token_seats, positions), batch)
        logits = self._model.logits(hidden.index_select(0, sample_rows))
        tokens = self._sampler.sample_plain(logits, sample_seats, sample_positions)
        tables.write_tokens(sample_seats, sample_positions, tokens)
        return logits, tokens


def sizes_up_to(most: int) -> list[int]:
    """Powers of two and the numbers half way between them, from 512 on those at each quarter of the way; and `most`."""
    sizes, size = [], _SMALLEST
    while size < most:
        sizes += [size * quarters // 4 for quarters in ((4, 6) if size < _FINE_FROM else (4, 5, 6, 7))]
        size *= 2
    return [*(s for s in sizes if s < most), most]
