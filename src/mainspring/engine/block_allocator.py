"""Who owns which block of the KV cache: a free list and a reference count for every block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from mainspring.errors import MainspringError

NULL_BLOCK = 0


class BlockAccountingError(MainspringError):
    """The block allocator's books contradict each other or the requests' block tables: a bug of the engine."""


class BlockAllocator:
    """Hands out the blocks 1 .. num_blocks of a cache of num_blocks + 1; block 0 is the null block.

    A block is free exactly when its reference count is 0. Every operation takes O(1) a block. The block
    freed last is handed out first: its memory is the likeliest to be in the processor's cache.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._free = list(range(num_blocks, NULL_BLOCK, -1))
        self._ref_counts = [0] * (num_blocks + 1)

    @property
    def num_blocks(self) -> int:
        """Blocks that can be handed out."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self._num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with reference count 1, or None (and no change) if fewer are free."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        blocks = self._free[-count:]
        blocks.reverse()
        del self._free[-count:]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block; all must be in use."""
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise BlockAccountingError(f"block {block} is free and cannot be shared")
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block; a block without owners becomes free."""
        for block in reversed(blocks):
            if self._ref_counts[block] < 1:
                raise BlockAccountingError(f"block {block} is released more often than it was taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free.append(block)

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Hold the books against the block tables of all requests, which own every block in use.

        Raises:
            BlockAccountingError: a block is lost, free twice, free and in use, or miscounted.
        """
        owners = Counter(block for table in block_tables for block in table)
        free = set(self._free)
        if len(free) != len(self._free):
            raise BlockAccountingError("a block is in the free list twice")
        if NULL_BLOCK in free or NULL_BLOCK in owners:
            raise BlockAccountingError("the null block was handed out")
        for block in range(1, self._num_blocks + 1):
            count = self._ref_counts[block]
            if count != owners[block]:
                raise BlockAccountingError(
                    f"block {block} counts {count} owners, but {owners[block]} hold it"
                )
            if (count == 0) != (block in free):
                raise BlockAccountingError(
                    f"block {block} counts {count} owners, but free is {block in free}"
                )
