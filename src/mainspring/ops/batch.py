"""The packed token stream: what stands beside `tokens[T]` so that one forward serves training and serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from mainspring.errors import BackendError, ConfigError
from mainspring.ops.checks import check_boundaries, debugging


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers in blocks. Block 0 is the null block: it is never handed out.

    k, v: one tensor [num_blocks, block_size, num_kv_heads, head_dim] per layer. In float8_e4m3fn a value is
    float32(stored) · scale, where k_scale, v_scale hold a float32 [num_kv_heads] per layer.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    block_size: int
    k_scale: tuple[Tensor, ...] | None = None
    v_scale: tuple[Tensor, ...] | None = None

    @property
    def num_blocks(self) -> int:
        return self.k[0].shape[0]

    @staticmethod
    def allocate(
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """A cache of 2 · layers · blocks · block_size · heads · head_dim · itemsize bytes.

        Its contents are undefined: attention never reads a key that was not written. (On the CPU no page is
        touched before its first key is, so that gigabytes cost nothing at the start.) Scales of fp8 begin as ones.
        """
        if num_blocks < 2:
            raise ConfigError(f"a KV cache needs at least 2 blocks (one is the null block), got {num_blocks}")
        shape = (num_blocks, block_size, num_kv_heads, head_dim)

        def tensors() -> tuple[Tensor, ...]:
            return tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))

        def scales() -> tuple[Tensor, ...] | None:
            if dtype is not torch.float8_e4m3fn:
                return None
            return tuple(torch.ones(num_kv_heads, device=device) for _ in range(num_layers))

        return KVCache(tensors(), tensors(), block_size, scales(), scales())


class LinearAdapters(Protocol):
    """What LoRA adapters add to the linear layers' results, each token by its own adapter."""

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y + x Aᵀ Bᵀ · scale. name: of the linear layer, as in `Decoder`; x: [T, in] -> y: [T, out]."""
        ...


@dataclass(frozen=True)
class TokenBatch:
    """Where each token of a packed stream stands, and where its keys live.

    S sequences lie end to end in the stream; sequence s owns tokens cu_seqlens[s] .. cu_seqlens[s + 1].
    It has context_lens[s] keys once the stream's own are in; its i-th token here is at position
    context_lens[s] - n_s + i.
    """

    positions: Tensor  # [T] int64, position of each token in its own sequence
    cu_seqlens: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    lengths: tuple[int, ...]  # [S] on the host: tokens of each sequence in this stream
    contexts: tuple[int, ...]  # [S] on the host: the same as context_lens
    rope_lengths: tuple[int, ...]  # [S] the length that fixes the base of `dynamic` RoPE
    cache: KVCache | None = None
    slots: Tensor | None = None  # [T] int64: block * block_size + offset of each new key
    block_tables: Tensor | None = None  # [S, B] int32, rows padded with the null block
    adapters: LinearAdapters | None = None  # of the tokens, where some have one
    tickets: Tensor | None = (
        None  # [*] int32 zeros: counters of decode kernels, which leave them zero; else made anew
    )

    def __post_init__(self) -> None:
        if debugging():
            check_block_tables(self)

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @staticmethod
    def packed(
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        rope_lengths: Sequence[int] | None = None,
    ) -> TokenBatch:
        """Whole sequences of the given lengths, end to end, with no cache."""
        if not lengths or min(lengths) < 1:
            raise ConfigError(f"sequence lengths must be at least 1, got {list(lengths)}")
        # Not from a list of numbers: that costs the host milliseconds a step, in which a GPU has nothing to do.
        starts = torch.tensor(list(accumulate(lengths, initial=0)))
        sizes = torch.tensor(lengths)
        positions = torch.arange(sum(lengths)) - starts[:-1].repeat_interleave(sizes)
        return TokenBatch(
            positions=positions.to(device),
            cu_seqlens=starts.to(device, torch.int32),
            context_lens=sizes.to(device, torch.int32),
            lengths=tuple(lengths),
            contexts=tuple(lengths),
            rope_lengths=tuple(rope_lengths if rope_lengths is not None else lengths),
        )

    @staticmethod
    def paged(
        lengths: Sequence[int],
        contexts: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        cache: KVCache,
        rope_lengths: Sequence[int] | None = None,
    ) -> TokenBatch:
        """The next lengths[s] tokens of each sequence, whose keys live in the blocks of block_tables[s].

        contexts[s] counts the cached keys and the new ones; block_tables[s] must cover them.
        """
        size = cache.block_size
        positions: list[int] = []
        slots: list[int] = []
        for n, context, table in zip(lengths, contexts, block_tables, strict=True):
            if n < 1 or context < n or len(table) * size < context:
                raise ConfigError(
                    f"a sequence with {n} new tokens and {context} keys does not fit {len(table)} blocks of {size}"
                )
            if n == 1:
                positions.append(context - 1)
                slots.append(table[(context - 1) // size] * size + (context - 1) % size)
            else:
                span = range(context - n, context)
                positions.extend(span)
                slots.extend(table[p // size] * size + p % size for p in span)
        device = cache.k[0].device
        width = max(-(-context // size) for context in contexts)
        rows = [list(table[:width]) + [0] * (width - len(table)) for table in block_tables]
        return TokenBatch(
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            cu_seqlens=_boundaries(lengths, device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            lengths=tuple(lengths),
            contexts=tuple(contexts),
            rope_lengths=tuple(rope_lengths if rope_lengths is not None else contexts),
            cache=cache,
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(rows, dtype=torch.int32, device=device),
        )


def check_block_tables(batch: TokenBatch) -> None:
    """Raises BackendError if sequences do not lie end to end in the stream, or if a block table, a slot or a context
    of a paged batch points outside its cache.

    Kernels trust these numbers: a wrong one reads or overwrites another sequence's keys, or memory that is no cache
    at all. Every entry that a context reaches must be one of the cache's blocks, a slot one of its places (a negative
    slot means that nothing is written), and two tokens must not write to one slot (block 0, the null block, excepted).
    With MAINSPRING_DEBUG=1 each TokenBatch is checked when it is made; call it too where a captured graph's tables
    change under the batch.
    """
    check_boundaries("batch", "cu_seqlens", batch.cu_seqlens, batch.num_tokens)
    if batch.cache is None or batch.slots is None or batch.block_tables is None:
        return
    size, blocks = batch.cache.block_size, batch.cache.num_blocks
    tables, contexts = batch.block_tables.tolist(), batch.context_lens.tolist()
    if len(tables) != len(contexts):
        raise BackendError(f"block tables of {len(tables)} sequences, contexts of {len(contexts)}")
    for s, (table, context) in enumerate(zip(tables, contexts, strict=True)):
        needed = -(-context // size)
        if context < 0 or needed > len(table):
            raise BackendError(
                f"sequence {s} has {context} keys; {len(table)} blocks of {size} hold 0 to {len(table) * size}"
            )
        for place, block in enumerate(table[:needed]):
            if not 0 <= block < blocks:
                raise BackendError(
                    f"block table of sequence {s} names block {block} at {place}; "
                    f"the cache has blocks 0 to {blocks - 1}"
                )
    writers: dict[int, int] = {}
    for token, slot in enumerate(batch.slots.tolist()):
        if slot >= blocks * size:
            raise BackendError(
                f"token {token} writes to slot {slot}; the cache has slots 0 to {blocks * size - 1}"
            )
        if slot >= size and writers.setdefault(slot, token) != token:
            raise BackendError(f"tokens {writers[slot]} and {token} both write to slot {slot}")


def _boundaries(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
