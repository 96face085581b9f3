"""Who owns which block of the KV cache: reference counts, a free list, and which block holds which known content."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from mainspring.errors import MainspringError

NULL_BLOCK = 0


class BlockAccountingError(MainspringError):
    """The block allocator's books contradict each other or the requests' block tables: a bug of the engine."""


class BlockAllocator:
    """Hands out the blocks 1 .. num_blocks of a cache of num_blocks + 1; block 0 is the null block.

    A block is free exactly when its reference count is 0. A free block may still hold content that is known by its
    hash (`publish`): it can be taken back by that name (`take_cached`) until it is handed out anew. Blocks without
    such content are handed out first, the one freed last before the others (its memory is the likeliest to be in the
    processor's cache), then those with content, the one freed first before the others (LRU). Every operation takes
    O(1) a block.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        # Handed out from the front. An OrderedDict is a linked list with O(1) removal from anywhere.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._ref_counts = [0] * (num_blocks + 1)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

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

    @property
    def num_cached(self) -> int:
        """Blocks whose content is known by its hash."""
        return len(self._hash_of)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with reference count 1, or None (and no change) if fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
            self._forget(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block; all must be in use."""
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise BlockAccountingError(f"block {block} is free and cannot be shared")
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block; a block without owners becomes free.

        The last blocks of a sequence are the first to be handed out again: others are likelier to share its beginning.
        """
        for block in reversed(blocks):
            if self._ref_counts[block] < 1:
                raise BlockAccountingError(f"block {block} is released more often than it was taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, content: bytes) -> None:
        """A block in use holds the keys and values of that content from now on. The first of equal blocks stays."""
        if self._ref_counts[block] < 1:
            raise BlockAccountingError(f"block {block} is free and cannot be named")
        if content not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = content
            self._block_of[content] = block

    def find_cached(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a chain of contents. Nothing is taken."""
        blocks = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take_cached(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block with known content, free or in use."""
        for block in blocks:
            if block not in self._hash_of:
                raise BlockAccountingError(f"block {block} holds no known content")
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def is_free(self, block: int) -> bool:
        return self._ref_counts[block] == 0

    def forget_all(self) -> None:
        """No content is valid any more (new weights, a new cache)."""
        self._hash_of.clear()
        self._block_of.clear()

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Hold the books against the block tables of all requests, which own every block in use.

        Raises:
            BlockAccountingError: a block is lost, free twice, free and in use, miscounted or misnamed.
        """
        owners = Counter(block for table in block_tables for block in table)
        if NULL_BLOCK in self._free or NULL_BLOCK in owners:
            raise BlockAccountingError("the null block was handed out")
        for block in range(1, self._num_blocks + 1):
            count = self._ref_counts[block]
            if count != owners[block]:
                raise BlockAccountingError(
                    f"block {block} counts {count} owners, but {owners[block]} hold it"
                )
            if (count == 0) != (block in self._free):
                raise BlockAccountingError(
                    f"block {block} counts {count} owners, but free is {block in self._free}"
                )
        if {content: block for block, content in self._hash_of.items()} != self._block_of:
            raise BlockAccountingError("the names of blocks and the blocks of names differ")

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]
