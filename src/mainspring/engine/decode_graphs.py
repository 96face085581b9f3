"""Decode steps of fixed sizes, from the tables on the device to the sampled tokens, replayed from CUDA graphs.

A step of n requests runs in the smallest size that holds it. The rows beyond n are the dummy seat's: they read and
write the null block and a row of the tables that nobody looks at. In lockstep a row's bits do not depend on how many
there are, so padding changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mainspring.engine.hooks import Sampler
from mainspring.engine.seats import SeatTables
from mainspring.engine.served_model import ServedModel, announcement
from mainspring.engine.step_input import Ints, send
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.ops.decode_inputs import decode_inputs, put_tokens


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What a decode step gave. logits: [n, V] float32 and tokens: [n] int64, valid until the next step;
    seats, positions: [n] int64, whose the tokens are and where they stand."""

    logits: Tensor
    tokens: Tensor
    seats: Tensor
    positions: Tensor


@dataclass(slots=True)
class _Size:
    """One size's inputs, outputs, and the graph between them. `graph` is None on a CPU, where the step is run anew."""

    inputs: Tensor  # [3, N] int64: seats, positions of the tokens to be computed, blocks of their keys
    boundaries: Tensor  # [N + 1] int32: 0, 1 ... N
    outputs: tuple[Tensor, Tensor, Tensor] | None = None  # logits, tokens, positions
    graph: torch.cuda.CUDAGraph | None = None
    announce: Callable[[], None] | None = None  # before each replay, to the other ranks of a layout


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24 ... 256, then every 32 and from 512 on every 64, and `most`: what products are tiled by."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, 512, 32), *range(512, most, 64))
    return sorted({size for size in sizes if size < most} | {most})


class DecodeGraphs:
    """Decode steps of one token a request, for requests that the sampler calls plain or not (it samples these again).

    All graphs share one pool of memory: only one runs at a time, and what it gave is read before the next.
    """

    def __init__(
        self, model: ServedModel, tables: SeatTables, sampler: Sampler, cache: KVCache, max_model_len: int
    ) -> None:
        self._model = model
        self._tables = tables
        self._sampler = sampler
        self._cache = cache
        self._max_model_len = max_model_len
        self._numbers = sizes_up_to(tables.dummy)
        self._sizes: dict[int, _Size] = {}
        self._tickets = torch.zeros(
            tables.dummy * model.config.num_heads, dtype=torch.int32, device=model.device
        )
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        if model.device.type == "cuda":
            self._capture_all()

    def run(self, rows: Ints) -> DecodeRows:
        """rows: [3, n] seats, positions, blocks, of at least one and at most as many requests as there are seats."""
        count = rows.shape[1]
        size = self._numbers[bisect_left(self._numbers, count)]
        padded = np.zeros((3, size), dtype=np.int64)
        padded[0, count:] = self._tables.dummy
        padded[:, :count] = rows
        step = self._size(size)
        if step.graph is None:
            step.inputs.copy_(send([padded], self._model.device)[0])
            step.outputs = self._run(step, tuple((padded[1] + 1).tolist()))
        else:
            pinned = torch.empty((3, size), dtype=torch.int64, pin_memory=True)
            pinned.numpy()[:] = padded
            step.inputs.copy_(pinned, non_blocking=True)
            if step.announce is not None:
                step.announce()
            step.graph.replay()
        assert step.outputs is not None  # set just now, or when the graph was captured
        logits, tokens, positions = step.outputs
        return DecodeRows(logits[:count], tokens[:count], step.inputs[0, :count], positions[:count])

    def _size(self, size: int) -> _Size:
        if size not in self._sizes:
            inputs = torch.zeros((3, size), dtype=torch.int64, device=self._model.device)
            inputs[0] = self._tables.dummy
            boundaries = torch.arange(size + 1, dtype=torch.int32, device=self._model.device)
            self._sizes[size] = _Size(inputs, boundaries)
        return self._sizes[size]

    def _run(self, step: _Size, contexts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The step itself. contexts: the keys of each row, or bounds of them where the device alone knows.

        Returns (logits, tokens, positions of the tokens).
        """
        tables, size = self._tables, self._tables.block_size
        policy = self._model.policy
        seats, positions, _ = step.inputs
        width = -(-max(contexts) // size)
        known = decode_inputs(step.inputs, tables.tokens, tables.blocks, size, width, policy=policy)
        ones = (1,) * len(contexts)
        batch = TokenBatch(
            positions=positions,
            cu_seqlens=step.boundaries,
            context_lens=known.context_lens,
            lengths=ones,
            contexts=contexts,
            rope_lengths=ones,  # where it matters the step is none of these
            cache=self._cache,
            slots=known.slots,
            block_tables=known.block_tables,
            tickets=self._tickets,
        )
        logits = self._model.logits(self._model(known.tokens, batch))
        sampled = self._sampler.sample_plain(logits, seats, known.next_positions)
        put_tokens(tables.tokens, seats, known.next_positions, sampled, policy=policy)
        return logits, sampled, known.next_positions

    @torch.inference_mode()
    def _capture_all(self) -> None:
        """The largest first: the smaller ones then find all the memory that they need in the pool."""
        stream = torch.cuda.Stream()
        for size in reversed(self._numbers):
            step = self._size(size)
            stream.wait_stream(torch.cuda.current_stream())  # which sets the step's inputs
            contexts = (self._max_model_len,) * size
            with torch.cuda.stream(stream):
                self._run(step, contexts)  # compiles and loads what a capture could not
            stream.synchronize()
            step.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(step.graph, pool=self.pool, stream=stream):
                logits, tokens, positions = self._run(step, contexts)
            step.announce = announcement(self._model)
            # The memory of the logits goes back to the pool, for those of the next graph.
            step.outputs = unowned(logits), tokens, positions
            del logits
        torch.cuda.current_stream().wait_stream(stream)


class _Address:
    """A tensor's memory, described to PyTorch without owning it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def unowned(tensor: Tensor) -> Tensor:
    """A float32 tensor on the same memory, which somebody else must keep alive: here, the graph's pool."""
    return torch.as_tensor(_Address(tensor), device=tensor.device)
