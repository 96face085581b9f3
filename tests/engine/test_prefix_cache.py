"""Blocks are shared by their content: what is found, what is forgotten first, what is kept apart."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from engine.test_core import (
    VOCAB,
    run,
    tiny_model,
)
from mainspring.engine.admission import make_request
from mainspring.engine.block_allocator import BlockAccountingError, BlockAllocator
from mainspring.engine.block_hash import extend_hashes, root_hash
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.sampling_params import SamplingParams

# As on a GPU: one step of lag, decode steps of fixed sizes.
AHEAD: dict[str, Any] = {"async_scheduling": True, "cuda_graphs": True}


def test_the_second_request_with_a_prompt_computes_only_its_last_block() -> None:
    core = EngineCore(tiny_model("qwen3"), EngineConfig(block_size=4))
    prompt = [(5 * i) % VOCAB for i in range(23)]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    cached = []
    for number in range(3):
        longer = prompt + [7] * number
        core.add_request(make_request("r", longer, params, core.limits, ()))
        while core.has_work():
            cached += [output.num_cached_tokens for output in core.step() if output.rope_length is not None]
    assert cached == [0, 20, 24]  # the second one's prompt filled a block more
    assert core.stats().prefix_cache_queries_total == 23 + 24 + 25
    assert core.stats().prefix_cache_hits_total == 44
    core.check_integrity()


def test_a_conversation_that_goes_on_finds_the_generated_tokens_in_the_cache() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(block_size=4, **AHEAD))
    params = SamplingParams(temperature=0, max_tokens=15)
    [first] = run(core, [([1, 2, 3], params)])
    [second] = run(core, [([1, 2, 3, *first.tokens, 9], params)])
    assert core.stats().prefix_cache_hits_total == 16  # 3 + 15 tokens, of which the last was never computed
    assert second.tokens == run(EngineCore(tiny_model("llama")), [(second.prompt, params)])[0].tokens


def test_salts_adapters_and_turning_it_off_keep_prefixes_apart() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(block_size=4))
    off = EngineCore(tiny_model("llama"), EngineConfig(block_size=4, enable_prefix_caching=False))

    def hits(core: EngineCore, **fields: object) -> int:
        before = core.stats().prefix_cache_hits_total
        request = make_request("r", list(range(20)), SamplingParams(max_tokens=1), core.limits, ())
        core.add_request(replace(request, **fields))
        while core.has_work():
            core.step()
        return core.stats().prefix_cache_hits_total - before

    assert [hits(core), hits(core), hits(core, cache_salt="a"), hits(core, cache_salt="a")] == [0, 16, 0, 16]
    assert [hits(off), hits(off)] == [0, 0]


def test_blocks_without_owners_are_reused_the_oldest_first_and_those_without_content_before_all() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(4)
    assert blocks is not None
    for number, block in enumerate(blocks[:3]):
        allocator.publish(block, bytes([number]))
    allocator.release(blocks[1:2])
    allocator.release(blocks[3:4])
    allocator.release([blocks[0], blocks[2]])
    assert allocator.find_cached([b"\0", b"\1", b"\2", b"\3"]) == blocks[:3]
    allocator.take_cached([blocks[0]])
    # Nothing is known of block 3; of the others block 1 has been free for longest.
    assert allocator.allocate(2) == [blocks[3], blocks[1]]
    assert allocator.find_cached([b"\0", b"\1", b"\2"]) == [blocks[0]]
    assert allocator.find_cached([b"\2"]) == [blocks[2]]
    allocator.check([[blocks[0]], [blocks[3], blocks[1]]])
    with pytest.raises(BlockAccountingError, match="no known content"):
        allocator.take_cached([blocks[1]])


def test_hashes_are_chained_and_extended_the_same_in_pieces() -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    whole: list[bytes] = []
    extend_hashes(whole, b"root", tokens, 2, 5)
    pieces: list[bytes] = []
    for blocks in (1, 3, 3, 5):
        extend_hashes(pieces, b"root", tokens, 2, blocks)
    assert pieces == whole
    assert len(set(whole)) == 5
    other: list[bytes] = []
    extend_hashes(other, b"root", [0, *tokens[1:]], 2, 5)
    assert not set(other) & set(whole)
    assert root_hash("a", 0, None) != root_hash(None, 0, None) != root_hash(None, 1, None)
