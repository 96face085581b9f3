"""Blocks are handed out once, counted by owner, and never lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.block_allocator import NULL_BLOCK, BlockAccountingError, BlockAllocator


def test_hands_out_each_block_once_and_never_the_null_block() -> None:
    allocator = BlockAllocator(5)
    blocks = allocator.allocate(5)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4, 5]
    assert NULL_BLOCK not in blocks
    assert allocator.num_free == 0
    assert allocator.num_used == 5


def test_refuses_more_than_is_free_without_taking_any() -> None:
    allocator = BlockAllocator(3)
    assert allocator.allocate(4) is None
    assert allocator.num_free == 3
    assert allocator.allocate(0) == []


def test_a_shared_block_is_freed_by_its_last_owner() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    assert blocks is not None
    allocator.share(blocks)
    allocator.release(blocks)
    assert allocator.num_free == 1
    allocator.check([blocks])
    allocator.release(blocks)
    assert allocator.num_free == 2
    allocator.check([])


def test_releasing_or_sharing_a_free_block_is_an_error() -> None:
    allocator = BlockAllocator(2)
    with pytest.raises(BlockAccountingError, match="block 1"):
        allocator.release([1])
    with pytest.raises(BlockAccountingError, match="block 2"):
        allocator.share([2])


def test_check_finds_a_lost_block() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    assert blocks is not None
    with pytest.raises(BlockAccountingError):
        allocator.check([blocks[:1]])
    with pytest.raises(BlockAccountingError):
        allocator.check([blocks, blocks])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 6))))
def test_books_stay_right_under_any_sequence_of_operations(
    num_blocks: int, operations: list[tuple[str, int]]
) -> None:
    allocator = BlockAllocator(num_blocks)
    tables: list[list[int]] = []
    for operation, number in operations:
        if operation == "take":
            free = allocator.num_free
            blocks = allocator.allocate(number)
            assert (blocks is None) == (number > free)
            if blocks is not None:
                tables.append(blocks)
        elif tables and operation == "share":
            table = tables[number % len(tables)]
            allocator.share(table)
            tables.append(list(table))
        elif tables:
            allocator.release(tables.pop(number % len(tables)))
        allocator.check(tables)
        assert allocator.num_free + allocator.num_used == num_blocks
