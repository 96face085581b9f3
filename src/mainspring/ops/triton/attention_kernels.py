"""Attention's kernels in Triton: a loop over all keys of a tile of rows, or a program a chunk and one that merges.

The query heads that share a key head are rows of one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mainspring.ops.triton.canonical_order import block, log_sum, merge, whole_sum


@triton.jit
def sequence_of(cu_seqlens, num_seqs, tile, group, ROWS: tl.constexpr):
    """The sequence that owns a tile: sequence s owns tiles from floor(cu_seqlens[s] · group / ROWS) + s on."""
    low, high = 0, num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) * group // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def load_keys(
    source, table, start, first, context, kv_head, columns, dims, stride,
    HEAD_DIM: tl.constexpr, PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys (or values) first .. first + BLOCK of a sequence and one head, [BLOCK, D]; zeros beyond its end,
    or, by TMA, those of its neighbours, which are masked."""
    if TMA:
        return source.load([start + first, kv_head * HEAD_DIM])
    else:
        inside = columns < context
        if PAGED:
            block = tl.load(table + columns // BLOCK_SIZE, inside, 0).to(tl.int64)
            rows = block * BLOCK_SIZE + columns % BLOCK_SIZE
        else:
            rows = (start + columns).to(tl.int64)
        offsets = rows[:, None] * stride + kv_head * HEAD_DIM + dims[None, :]
        return tl.load(source + offsets, inside[:, None] & (dims < HEAD_DIM)[None, :], 0.0)


@triton.jit(
    do_not_specialize=["num_seqs", "longer_than", "tokens", "window", "q_heads", "group", "table_stride"]
)
def attention_kernel(
    q, k, v, k_scale, v_scale, out, lse, part_out, part_state, cu_seqlens, context_lens, block_tables, scale, cap_in,
    cap_out, window, num_seqs, longer_than, tokens, q_stride, k_stride, v_stride, table_stride, q_heads, group,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr,
    SPLIT: tl.constexpr, LSE: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows (query tokens times the heads of a group) of one key head; with SPLIT one chunk of keys.

    part_out: [chunks, tokens, q_heads, HEAD_DIM], part_state: [2, chunks, tokens, q_heads] (peak, total).
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    kv_head = tl.program_id(1)
    s = sequence_of(cu_seqlens, num_seqs, tile, group, ROWS)
    start = tl.load(cu_seqlens + s)
    length = tl.load(cu_seqlens + s + 1) - start
    row0 = (tile - (start * group // ROWS + s)) * ROWS
    if row0 >= length * group or length <= longer_than:
        return
    if FP8:
        if CAPPED:
            cap_in *= tl.load(k_scale + kv_head)
        else:
            scale *= tl.load(k_scale + kv_head)
    context = tl.load(context_lens + s)
    lead = context - length  # position of the first query
    row = row0 + tl.arange(0, ROWS)
    positions = lead + row // group
    token = start + row // group
    head = kv_head * group + row % group
    dims = tl.arange(0, DIM)
    inside = (row < length * group)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = token.to(tl.int64)[:, None] * q_stride + (head * HEAD_DIM)[:, None] + dims[None, :]
    queries = tl.load(q + q_offsets, inside, 0.0)
    table = block_tables
    if PAGED:
        table += s.to(tl.int64) * table_stride

    first_position = lead + row0 // group
    last_position = lead + min(row0 + ROWS - 1, length * group - 1) // group
    low = 0
    if WINDOWED:
        low = max(first_position - window + 1, 0) // KEYS * KEYS
    high = last_position + 1
    if SPLIT:
        low = max(low, tl.program_id(2) * CHUNK)
        high = min(high, tl.program_id(2) * CHUNK + CHUNK)
        if low >= high:
            return
    full = max(
        min((first_position + 1) // KEYS * KEYS, high // KEYS * KEYS), low
    )  # blocks before it: all seen

    result = tl.zeros((ROWS, DIM), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    chunk_peak = tl.full((ROWS,), float("-inf"), tl.float32)
    chunk_total = tl.zeros((ROWS, 8), tl.float32)
    for masked in tl.static_range(2):  # blocks that all rows see whole, then those that a mask may cut
        for first in range(full if masked else low, high if masked else full, KEYS):
            columns = first + tl.arange(0, KEYS)
            keys = load_keys(
                k, table, start, first, context, kv_head, columns, dims, k_stride, HEAD_DIM, PAGED, BLOCK_SIZE, TMA
            )  # fmt: skip
            values = load_keys(
                v, table, start, first, context, kv_head, columns, dims, v_stride, HEAD_DIM, PAGED, BLOCK_SIZE, TMA
            )  # fmt: skip
            acc, chunk_peak, chunk_total = block(
                queries, keys.to(queries.dtype), values.to(queries.dtype), acc, chunk_peak, chunk_total, positions,
                columns, scale, cap_in, cap_out, window, WINDOWED or masked, WINDOWED, CAPPED, PRECISION, ROWS, KEYS,
            )  # fmt: skip
            if not SPLIT:  # noqa: SIM102 - the outer condition is the compiler's
                if (first + KEYS) % CHUNK == 0:
                    result, peak, total = merge(
                        result, peak, total, acc, chunk_peak, whole_sum(chunk_total, ROWS), scale
                    )
                    acc = tl.zeros((ROWS, DIM), tl.float32)
                    chunk_peak = tl.full((ROWS,), float("-inf"), tl.float32)
                    chunk_total = tl.zeros((ROWS, 8), tl.float32)
    if SPLIT:
        index = (tl.program_id(2).to(tl.int64) * tokens + token) * q_heads + head
        state = part_state + index
        tl.store(part_out + index[:, None] * HEAD_DIM + dims[None, :], acc, inside)
        tl.store(state, chunk_peak, row < length * group)
        plane = tl.num_programs(2).to(tl.int64) * tokens * q_heads
        tl.store(state + plane, whole_sum(chunk_total, ROWS), row < length * group)
    else:
        # What is left of an unfinished chunk; nothing, exactly, where the last one was finished.
        result, peak, total = merge(result, peak, total, acc, chunk_peak, whole_sum(chunk_total, ROWS), scale)
        offsets = (token.to(tl.int64) * q_heads + head)[:, None] * HEAD_DIM + dims[None, :]
        if FP8:
            result *= tl.load(v_scale + kv_head)
        tl.store(out + offsets, (result * (1.0 / total)[:, None]).to(out.dtype.element_ty), inside)
        if LSE:
            tl.store(
                lse + head.to(tl.int64) * tokens + token, log_sum(peak, total, scale), row < length * group
            )


@triton.jit(do_not_specialize=["num_seqs", "longer_than", "tokens", "window", "chunks", "q_heads", "group"])
def merge_kernel(
    part_out, part_state, k_scale, v_scale, out, lse, cu_seqlens, context_lens, scale, window, num_seqs, longer_than,
    tokens, chunks, q_heads, group, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LSE: tl.constexpr, FP8: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Joins the chunks that one token and head sees, in order. Grid: (tokens, q_heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    low_s, high_s = 0, num_seqs - 1
    while low_s < high_s:  # the last sequence that starts at or before the token
        middle = (low_s + high_s + 1) // 2
        if tl.load(cu_seqlens + middle) <= token:
            low_s = middle
        else:
            high_s = middle - 1
    end = tl.load(cu_seqlens + low_s + 1)
    if end - tl.load(cu_seqlens + low_s) <= longer_than:
        return
    if FP8 and not CAPPED:
        scale *= tl.load(k_scale + head // group)
    position = tl.load(context_lens + low_s) - (end - token)
    low = 0
    if WINDOWED:
        low = max(position - window + 1, 0) // CHUNK
    high = position // CHUNK + 1
    dims = tl.arange(0, DIM)
    plane = chunks.to(tl.int64) * tokens * q_heads
    result = tl.zeros((1, DIM), tl.float32)
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    one = tl.arange(0, 1)
    for first in range(low, high, UNROLL):
        for i in tl.static_range(UNROLL):
            chunk = first + i
            index = (chunk.to(tl.int64) * tokens + token) * q_heads + head + one
            there = chunk + one < high
            chunk_peak = tl.load(part_state + index, there, float("-inf"))
            chunk_total = tl.load(part_state + plane + index, there, 0.0)
            mask = there[:, None] & (dims < HEAD_DIM)[None, :]
            acc = tl.load(part_out + index[:, None] * HEAD_DIM + dims[None, :], mask, 0.0)
            result, peak, total = merge(result, peak, total, acc, chunk_peak, chunk_total, scale)
    offsets = ((token.to(tl.int64) * q_heads + head) * HEAD_DIM + dims)[None, :]
    if FP8:
        result *= tl.load(v_scale + head // group)
    tl.store(
        out + offsets, (result * (1.0 / total)[:, None]).to(out.dtype.element_ty), (dims < HEAD_DIM)[None, :]
    )
    if LSE:
        tl.store(lse + head.to(tl.int64) * tokens + token + one, log_sum(peak, total, scale))
