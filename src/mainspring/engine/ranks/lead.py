"""Rank 0's model: looks like a whole one to the engine, and has every rank do its part of each call.

Scheduling, sampling, grammars, drafts and all that is known of requests live on rank 0 alone; the other ranks get a
step's tokens, positions and block tables and keep their part of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from mainspring.engine.ranks.adapters import ShardAdapters, ShardBatchAdapters
from mainspring.engine.ranks.channel import Message, Op
from mainspring.engine.ranks.group import ANSWER_SECONDS, RankGroup
from mainspring.engine.ranks.layout import check_serving_layout
from mainspring.engine.ranks.shard import CacheShape, copy_blocks, packed_pieces
from mainspring.engine.ranks.weights import checksum, copy_weight
from mainspring.engine.ranks.worker import build_shard, free_memory
from mainspring.errors import CheckpointError, ConfigError, EngineDeadError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import check_sequences
from mainspring.model.initialise import torch_device, torch_dtype
from mainspring.ops import Numerics
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import DISK_TIMEOUT
from mainspring.parallel.placement import full_shapes, hf_shapes

_LARGE_SECONDS = DISK_TIMEOUT.total_seconds()  # for calls as long as a checkpoint or a caller's list


class LeadModel(nn.Module):
    """A model over the ranks of a layout. One thread calls it; `close` ends the other ranks."""

    def __init__(
        self,
        directory: str | Path,
        layout: Layout,
        *,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        numerics: Numerics = "lockstep",
        num_threads: int | None = None,
        piece_tokens: int | None = None,
        random_weights: bool = False,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Starts the ranks, each of which loads its own part.

        directory: a Hugging Face directory that all ranks see. layout: as `serving_layout` gives it. num_threads: of
        one operation of each rank, on a CPU; None: PyTorch's choice here, an equal share of the cores on the others.
        piece_tokens: least tokens of the pieces that a step is cut into for the stages of a pipeline; None: by device.
        random_weights: the directory holds config.json alone, and each rank draws its part (`draw_shard`).
        answer_seconds: how long the ranks may take for a call (kernels that it compiles included; not for weights and
        given sequences, which take as long as they are large) before they count as dead.

        Raises:
            ConfigError: the layout does not divide the model, or there are too few devices; nothing was started.
            CheckpointError: a rank cannot read its part. EngineDeadError: a rank has ended.
        """
        super().__init__()
        device = torch_device(device)
        config = ModelConfig.from_file(Path(directory) / "config.json")
        check_serving_layout(layout, config, device)
        if device.type == "cuda":
            device = torch.device("cuda", 0)
        dtype_name = dtype if dtype is not None else config.dtype
        torch_dtype(dtype_name)  # refused before anything starts
        self.layout = layout
        self.config = config
        self._group = RankGroup(layout.world, device, answer_seconds)
        self._num_captures = 0
        order = {
            "directory": str(directory), "layout": str(layout), "dtype": dtype_name, "numerics": numerics,
            "num_threads": num_threads, "piece_tokens": piece_tokens, "random_weights": random_weights,
        }  # fmt: skip
        try:
            with self._group.alive(_LARGE_SECONDS):
                self._post(Message.with_json(Op.LOAD, order))
                self._shard = build_shard(order, device)
        except BaseException:
            self._group.close()
            raise
        self.model = self._shard.model
        self.policy = self.model.policy

    @property
    def device(self) -> torch.device:
        return self._shard.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def numerics(self) -> str:
        return self.policy.numerics

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(torch.Size(shape).numel() for shape in full_shapes(self.config).values())

    @property
    def embedding(self) -> Tensor:
        """Rank 0's rows of the input embedding."""
        assert self.model.embedding is not None  # rank 0 is of the first stage
        return self.model.embedding

    @property
    def supports_graphs(self) -> bool:
        """Whether steps can be captured: where experts are spread, the host must know how many rows travel, and stages
        hand over from the host."""
        return self.layout.pp == 1 and self.layout.ep == 1

    @property
    def cache_shape(self) -> CacheShape:
        """Of the rank that holds most: by it the cache is sized."""
        return self._shard.largest_cache_shape

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the other ranks, where this process has started them."""
        return self._group.pids

    def check(self) -> None:
        """Raises EngineDeadError if a rank has ended."""
        self._group.check()

    def alive(self) -> AbstractContextManager[None]:
        """Waiting for the device inside, the end of a rank becomes EngineDeadError."""
        return self._group.alive()

    def forward(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """As `Decoder.forward`, through a paged cache. Raises EngineDeadError if a rank is gone."""
        assert batch.slots is not None and batch.block_tables is not None  # the engine's batches are paged
        with self._group.alive():
            if self.layout.world > 1:
                capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
                self._num_captures += capturing
                tickets = 0 if batch.tickets is None else batch.tickets.numel()
                ids = (
                    batch.adapters.lora_ids if isinstance(batch.adapters, ShardBatchAdapters) else tokens[:0]
                )
                shape = (batch.num_tokens, len(batch.lengths), batch.block_tables.shape[1], len(ids))
                host = (*batch.lengths, *batch.contexts, *batch.rope_lengths)
                self._send(Op.FORWARD, int(capturing), *shape, tickets, *host)
                pieces = (
                    tokens, batch.positions, batch.slots, batch.cu_seqlens, batch.context_lens, batch.block_tables,
                    ids,
                )  # fmt: skip
                size, _ = packed_pieces(None, *shape)
                packed = torch.empty(size, dtype=torch.int32, device=self.device)
                for place, piece in zip(packed_pieces(packed, *shape)[1], pieces, strict=True):
                    place.copy_(piece.reshape(-1))
                self._shard.broadcast(packed)
            return self._shard.forward(tokens, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.logits`."""
        with self._group.alive():
            self._send(Op.LOGITS, hidden.shape[0])
            return self._shard.logits(hidden.contiguous())

    @torch.no_grad()
    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        temperature: float = 1.0,
        rope_length: int | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """As `Decoder.log_probs`, without gradients: in lockstep the bits that the engine reports for these tokens.

        Raises InvalidRequestError, and ConfigError under a pipeline, whose ranks have some of the layers each.
        """
        check_sequences(sequences, temperature, self.config.vocab_size)
        if self.layout.pp > 1:
            raise ConfigError(
                f"layout {self.layout}: given sequences are scored where every rank has all layers; use pp 1, or ask "
                "the engine for prompt_logprobs"
            )
        given = [[int(token) for token in sequence] for sequence in sequences]
        lengths = rope_length if rope_length is None or isinstance(rope_length, int) else list(rope_length)
        with self._group.alive(_LARGE_SECONDS):
            self._post(Message.with_json(Op.SCORE, [given, temperature, lengths]))
            return self.model.log_probs(given, temperature, lengths)

    def allocate_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
        """Every rank its part; the result is this rank's."""
        with self._group.alive():
            name = str(dtype).removeprefix("torch.")
            self._post(Message.with_json(Op.ALLOCATE, [num_blocks, block_size, name]))
        self._shard.cache = self._shard.cache_shape.allocate(num_blocks, block_size, dtype, self.device)
        return self._shard.cache

    def free_cache(self) -> None:
        """Every rank gives its part back, and its graphs."""
        with self._group.alive():
            self._send(Op.FREE)
        self._shard.cache = None
        self._num_captures = 0

    def copy_blocks(self, cache: KVCache, pairs: Tensor) -> None:
        """pairs: [N, 2] int64 on the device, (from, to), in every rank's part."""
        if self.layout.world > 1:
            with self._group.alive():
                self._send(Op.COPY_BLOCKS, *pairs.flatten().tolist())
        copy_blocks(cache, pairs)

    def last_capture(self) -> Callable[[], None]:
        """To be called before each replay of the graph that was captured last: the other ranks replay theirs."""
        number = self._num_captures - 1

        def announce() -> None:
            with self._group.alive():
                self._send(Op.REPLAY, number)

        return announce

    def load_adapters(self, adapters: Mapping[str, str | Path]) -> ShardAdapters:
        """Each rank its part of LoRA adapters: name -> directory, ids from 1 in this order.

        Raises CheckpointError, and ConfigError for an empty name; then no other rank has been told.
        """
        own = ShardAdapters(self.model, adapters)
        with self._group.alive(_LARGE_SECONDS):
            given = {name: str(directory) for name, directory in adapters.items()}
            self._post(Message.with_json(Op.ADAPTERS, given))
        self._shard.adapters = own
        return own

    def free_device_bytes(self) -> int:
        """The least of all ranks."""
        with self._group.alive():
            self._send(Op.FREE_MEMORY)
            return free_memory(self._shard)

    @torch.inference_mode()
    def copy_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """As `engine.weights.copy_weights`: whole tensors by their Hugging Face names, into every rank's part.

        Raises:
            CheckpointError: a name that the model does not have, or another shape; then nothing has been changed.
        """
        shapes = hf_shapes(self.config)
        given = dict(state_dict)
        if self.config.tie_word_embeddings:
            given.pop("lm_head.weight", None)
        for name, tensor in given.items():
            if name not in shapes:
                raise CheckpointError(f"the model has no tensor {name!r}")
            if tuple(tensor.shape) != shapes[name]:
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(tensor.shape)}, the model needs {list(shapes[name])}"
                )
        dtype = str(self.dtype).removeprefix("torch.")
        with self._group.alive(_LARGE_SECONDS):
            for name, tensor in given.items():
                whole = tensor.to(device=self.device, dtype=self.dtype).contiguous()
                self._post(Message.with_json(Op.COPY_WEIGHT, [name, list(whole.shape), dtype]))
                copy_weight(self.model, self._shard.parameters, name, self._shard.broadcast(whole))

    @torch.inference_mode()
    def checksum(self) -> str:
        """As `engine.weights.weights_checksum`: that of the whole model, under any layout."""
        with self._group.alive():
            self._send(Op.CHECKSUM)
            return checksum(self.model, self._shard.parameters)

    def close(self) -> None:
        """Ends the other ranks. Nothing can be computed afterwards."""
        try:
            self.check()
            with self._group.alive():
                self._send(Op.STOP)
        except EngineDeadError:
            pass  # they have been told by their fellow's end
        finally:
            self._group.close()

    def _send(self, op: Op, *words: int) -> None:
        self._post(Message(op, words))

    def _post(self, message: Message) -> None:
        self._group.check()
        if self.layout.world > 1:
            self._group.channel.post(message)
