"""Checks that read tensors on the host, and so wait for the device: made where MAINSPRING_DEBUG=1 asks for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mainspring.errors import BackendError

if TYPE_CHECKING:
    from mainspring.ops.batch import TokenBatch


def debugging() -> bool:
    """Whether the environment has MAINSPRING_DEBUG=1; read at each call, so that a test or a session can set it."""
    return os.environ.get("MAINSPRING_DEBUG") == "1"


def check_block_tables(batch: TokenBatch) -> None:
    """Raises BackendError if a block table, a slot or a context of a paged batch points outside its cache.

    Kernels trust these numbers: a wrong one reads or overwrites another sequence's keys, or memory that is no cache
    at all. Every entry that a context reaches must be one of the cache's blocks, a slot one of its places (a negative
    slot means that nothing is written), and two tokens must not write to one slot (block 0, the null block, excepted).
    With MAINSPRING_DEBUG=1 each TokenBatch is checked when it is made; call it too where a captured graph's tables
    change under the batch.
    """
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
