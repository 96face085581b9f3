"""Causal attention in canonical order over packed and paged keys, and writing those of the cache.

The keys of a row are reduced in chunks of KEY_CHUNK aligned at position 0. Within a chunk an online softmax
walks over blocks of keys (their size is a function of the head size and dtype); chunks are merged left to
right. One loop does it all where queries are many (prefill, training); where they are few (decode) a program
takes a chunk, and the same `_merge` joins the chunks in the same order. The query heads that share a key
head are rows of one tile. A fully masked block leaves a row's state as it was, so that it does not matter
which rows share a tile. What the weights of a chunk are relative to follows its largest score at a distance
(at most MAX_GROWTH), so that sums are hardly ever rescaled. csrc/cuda/paged_attention.cu has the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mainspring.ops.triton.support import (
    ALIGNMENT,
    check_dtype,
    has_tma,
    multiprocessors,
    on_device,
    require,
)

KEY_CHUNK = 512
MAX_HEAD_DIM = 256
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)
PARTIAL_BYTES = 256 << 20  # of a decode's partial outputs; beyond it the chunks are walked in one loop
LOG2_E = 1.4426950408889634
MAX_GROWTH = tl.constexpr(8.0)  # log2: how far a block's largest score may exceed the reference
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """keys is part of the canonical order; rows, warps and stages are not."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a head size. Two blocks of 64 rows a multiprocessor, one of which computes its softmax while
    the other multiplies, were faster on an H200 than one of 128 rows."""
    if dtype == torch.float32:
        return Tile(32, 32, 4 if head_dim <= 64 else 8, 1)
    if head_dim <= 64:
        return Tile(64, 128, 4, 2)
    if head_dim <= 128:
        return Tile(64, 64, 4, 3)
    return Tile(64, 64, 8, 2)


@triton.jit
def _sequence_of(cu_seqlens, num_seqs, tile, group, ROWS: tl.constexpr):
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
def _lane_sums(weights, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """[ROWS, KEYS] -> [ROWS, 8]: lane r has the columns 8 i + r, summed by a binary tree of neighbours. A thread holds
    whole lanes of a tensor core's product, and a sum of two is the same however Triton lays it out."""
    lanes = tl.reshape(weights, (ROWS, KEYS // 8, 8))
    for i in tl.static_range(5):
        if 1 << i < KEYS // 8:
            lanes = tl.sum(tl.reshape(lanes, (ROWS, KEYS // (16 << i), 2, 8)), 2)
    return tl.reshape(lanes, (ROWS, 8))


@triton.jit
def _whole_sum(lanes, ROWS: tl.constexpr):
    """[ROWS, 8] -> [ROWS], by a binary tree of neighbours."""
    pairs = tl.sum(tl.reshape(lanes, (ROWS, 4, 2)), 2)
    return tl.sum(tl.sum(tl.reshape(pairs, (ROWS, 2, 2)), 2), 1)


@triton.jit
def _block(
    q, keys, values, acc, peak, total, positions, columns, scale, cap_in, cap_out, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys into a chunk's state (acc, peak, total by lanes). Explicit fused multiply-adds: a
    compiler that was free to fuse might do so in one kernel and not in another."""
    scores = tl.dot(q, keys.T, input_precision=PRECISION)
    if CAPPED:  # cap_out · tanh, whose exponential never overflows to a NaN
        scores = tl.fma(-2.0 * cap_out, 1.0 / (1.0 + tl.exp2(scores * cap_in)), cap_out)
    if MASKED:
        seen = columns[None, :] <= positions[:, None]
        if WINDOWED:
            seen = seen & (columns[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    block_peak = tl.max(scores, 1)
    new_peak = tl.where((block_peak - peak) * scale > MAX_GROWTH, block_peak, peak)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(tl.fma(scores, scale, -(safe * scale)[:, None]))
    shrink = tl.exp2((peak - safe) * scale)
    total = tl.fma(total, shrink[:, None], _lane_sums(weights, ROWS, KEYS))
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def _merge_scalars(peak, chunk_peak, scale):
    """(new peak, factor of what was summed before, factor of the chunk)."""
    new_peak = tl.maximum(peak, chunk_peak)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, tl.exp2((peak - safe) * scale), tl.exp2((chunk_peak - safe) * scale)


@triton.jit
def _log_sum(peak, total, scale):
    """The natural logarithm of the sum of the exponentials."""
    return tl.fma(peak, scale, tl.log2(total)) * LN_2


@triton.jit
def _merge(out, peak, total, acc, chunk_peak, chunk_total, scale):
    """A chunk's state into the row's. out, acc: [rows, D]; the others [rows]."""
    new_peak, before, now = _merge_scalars(peak, chunk_peak, scale)
    total = tl.fma(total, before, chunk_total * now)
    out = tl.fma(out, before[:, None], acc * now[:, None])
    return out, new_peak, total


@triton.jit
def _load_keys(
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
    s = _sequence_of(cu_seqlens, num_seqs, tile, group, ROWS)
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
    for first in range(low, full, KEYS):
        columns = first + tl.arange(0, KEYS)
        keys = _load_keys(
            k,
            table,
            start,
            first,
            context,
            kv_head,
            columns,
            dims,
            k_stride,
            HEAD_DIM,
            PAGED,
            BLOCK_SIZE,
            TMA,
        )
        values = _load_keys(
            v,
            table,
            start,
            first,
            context,
            kv_head,
            columns,
            dims,
            v_stride,
            HEAD_DIM,
            PAGED,
            BLOCK_SIZE,
            TMA,
        )
        acc, chunk_peak, chunk_total = _block(
            queries, keys.to(queries.dtype), values.to(queries.dtype), acc, chunk_peak, chunk_total, positions,
            columns, scale, cap_in, cap_out, window, WINDOWED, WINDOWED, CAPPED, PRECISION, ROWS, KEYS,
        )  # fmt: skip
        if not SPLIT:  # noqa: SIM102 - the outer condition is the compiler's
            if (first + KEYS) % CHUNK == 0:
                result, peak, total = _merge(
                    result, peak, total, acc, chunk_peak, _whole_sum(chunk_total, ROWS), scale
                )
                acc = tl.zeros((ROWS, DIM), tl.float32)
                chunk_peak = tl.full((ROWS,), float("-inf"), tl.float32)
                chunk_total = tl.zeros((ROWS, 8), tl.float32)
    for first in range(full, high, KEYS):
        columns = first + tl.arange(0, KEYS)
        keys = _load_keys(
            k,
            table,
            start,
            first,
            context,
            kv_head,
            columns,
            dims,
            k_stride,
            HEAD_DIM,
            PAGED,
            BLOCK_SIZE,
            TMA,
        )
        values = _load_keys(
            v,
            table,
            start,
            first,
            context,
            kv_head,
            columns,
            dims,
            v_stride,
            HEAD_DIM,
            PAGED,
            BLOCK_SIZE,
            TMA,
        )
        acc, chunk_peak, chunk_total = _block(
            queries, keys.to(queries.dtype), values.to(queries.dtype), acc, chunk_peak, chunk_total, positions,
            columns, scale, cap_in, cap_out, window, True, WINDOWED, CAPPED, PRECISION, ROWS, KEYS,
        )  # fmt: skip
        if not SPLIT:  # noqa: SIM102
            if (first + KEYS) % CHUNK == 0:
                result, peak, total = _merge(
                    result, peak, total, acc, chunk_peak, _whole_sum(chunk_total, ROWS), scale
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
        tl.store(state + plane, _whole_sum(chunk_total, ROWS), row < length * group)
    else:
        # What is left of an unfinished chunk; nothing, exactly, where the last one was finished.
        result, peak, total = _merge(
            result, peak, total, acc, chunk_peak, _whole_sum(chunk_total, ROWS), scale
        )
        offsets = (token.to(tl.int64) * q_heads + head)[:, None] * HEAD_DIM + dims[None, :]
        if FP8:
            result *= tl.load(v_scale + kv_head)
        tl.store(out + offsets, (result / total[:, None]).to(out.dtype.element_ty), inside)
        if LSE:
            tl.store(
                lse + head.to(tl.int64) * tokens + token, _log_sum(peak, total, scale), row < length * group
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
            result, peak, total = _merge(result, peak, total, acc, chunk_peak, chunk_total, scale)
    offsets = ((token.to(tl.int64) * q_heads + head) * HEAD_DIM + dims)[None, :]
    if FP8:
        result *= tl.load(v_scale + head // group)
    tl.store(out + offsets, (result / total[:, None]).to(out.dtype.element_ty), (dims < HEAD_DIM)[None, :])
    if LSE:
        tl.store(lse + head.to(tl.int64) * tokens + token + one, _log_sum(peak, total, scale))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    max_length: int,
    max_context: int,
    lse: Tensor | None = None,
    out: Tensor | None = None,
    longer_than: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    split: bool | None = None,
    tile: Tile | None = None,
    chunk: int = KEY_CHUNK,
) -> Tensor:
    """Causal attention of ragged sequences. Query i of the n queries of sequence s stands at position
    p = context_lens[s] - n + i and sees keys j <= p (with a window: j > p - window).

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided, a token's heads are contiguous.
            D is at most 256. Finite, as k and v are.
        k: [T, Hkv, D] with the tokens of q (packed), or the cache [num_blocks, block_size, Hkv, D] (paged).
        v: likewise.
        cu_seqlens: [S + 1] int32, from 0 to T.
        context_lens: [S] int32, keys of each sequence, the queries' own included.
        block_tables: [S, B] int32 with a contiguous last dimension (paged), or None (packed). Trusted.
        scale: factor of the scores before softmax, above 0.
        window: sliding window in keys, or None or 0 for all.
        softcap: scores become softcap · tanh(scores / softcap); None or 0 for none.
        max_length: the largest number of queries of a sequence.
        max_context: the largest of context_lens.
        lse: [Hq, T] float32, contiguous: gets the natural logarithms of the sums of exp(scores), which a
            backward pass needs; None for none.
        out: [T, Hq, D] in q's dtype, contiguous, to write to.
        longer_than: sequences with at most so many queries are another kernel's: their rows stay as they are.
        k_scale: [Hkv] float32, contiguous: what each head's stored keys are to be multiplied by; with a float8_e4m3fn
            cache, and required there.
        v_scale: likewise, of the values.
        split: a program per chunk (True) or a loop over chunks (False); None chooses. It changes no bit.
        tile: another tile than the table's (tests and benchmarks); its `keys` are part of the order of sums.
        chunk: another size of chunks, likewise.

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        BackendError: a dtype, shape, layout or scale that the kernel does not take.
    """
    q, k, v = _check(q, k, v, cu_seqlens, context_lens, block_tables, scale)
    _check_scales("attention", k, k_scale, v_scale)
    tokens, q_heads, d = q.shape
    out = torch.empty((tokens, q_heads, d), dtype=q.dtype, device=q.device) if out is None else out
    if tokens == 0:
        return out
    kv_heads, num_seqs, paged = k.shape[-2], context_lens.shape[0], block_tables is not None
    group, dim = q_heads // kv_heads, max(16, triton.next_power_of_2(d))
    tile = tile or tile_of(dim, q.dtype)
    tiles = tokens * group // tile.rows + num_seqs
    chunks = triton.cdiv(max_context, chunk)
    if split is None:
        few = min(tiles, tokens) * kv_heads < 4 * multiprocessors(q.device)
        split = few or max_length == 1
    split = split and chunks > 1 and chunks * tokens * q_heads * d * 4 <= PARTIAL_BYTES
    tma = not paged and not split and _described(k) and _described(v) and q.dtype != torch.float32
    window, cap = window or 0, softcap or 0.0
    factor = 1.0 if cap else scale * LOG2_E
    caps = (2 * LOG2_E * scale / cap, cap * LOG2_E) if cap else (0.0, 0.0)
    require(
        "attention",
        lse is None
        or (lse.dtype is torch.float32 and lse.shape == (q_heads, tokens) and lse.is_contiguous()),
        f"lse must be a contiguous [{q_heads}, {tokens}] of float32",
    )
    part_out, part_state = out, out
    if split:
        part_out = torch.empty((chunks, tokens, q_heads, d), dtype=torch.float32, device=q.device)
        part_state = torch.empty((2, chunks, tokens, q_heads), dtype=torch.float32, device=q.device)
    with on_device(q):
        attention_kernel[(tiles, kv_heads, chunks if split else 1)](
            q, _tiles_of(k, tile, dim) if tma else k, _tiles_of(v, tile, dim) if tma else v, k_scale, v_scale, out, lse,
            part_out, part_state, cu_seqlens, context_lens, block_tables, factor, *caps, window, num_seqs, longer_than,
            tokens, q.stride(0), k.stride(-3), v.stride(-3), block_tables.stride(0) if block_tables is not None else 0,
            q_heads, group, HEAD_DIM=d, DIM=dim, ROWS=tile.rows, KEYS=tile.keys, CHUNK=chunk,
            PAGED=paged, BLOCK_SIZE=k.shape[1] if paged else 1, WINDOWED=window > 0, CAPPED=cap > 0, TMA=tma,
            SPLIT=split, LSE=lse is not None, FP8=k_scale is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if split:
            merge_kernel[(tokens, q_heads)](
                part_out, part_state, k_scale, v_scale, out, lse, cu_seqlens, context_lens, factor, window, num_seqs,
                longer_than, tokens, chunks, q_heads, group, HEAD_DIM=d, DIM=dim, CHUNK=chunk,
                WINDOWED=window > 0, CAPPED=cap > 0, LSE=lse is not None, FP8=k_scale is not None, UNROLL=8,
                num_warps=1,
            )  # fmt: skip
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors, with a token's heads contiguous."""
    name = "attention"
    check_dtype(name, q)
    tokens, q_heads, d = q.shape
    kv_heads, num_seqs = k.shape[-2], context_lens.shape[0]
    require(
        name,
        k.dtype in (q.dtype, FP8_DTYPE) and v.dtype is k.dtype and k.shape == v.shape and k.shape[-1] == d,
        f"k {k.dtype} {tuple(k.shape)} and v {v.dtype} {tuple(v.shape)} do not fit q {q.dtype} {tuple(q.shape)}",
    )
    require(
        name,
        0 < d <= MAX_HEAD_DIM and kv_heads > 0 and q_heads % kv_heads == 0,
        f"head_dim {d} must be at most {MAX_HEAD_DIM}, and {kv_heads} key heads divide the {q_heads} heads",
    )
    require(name, scale > 0, f"scale must be above 0, not {scale}")
    require(
        name,
        cu_seqlens.dtype is context_lens.dtype is torch.int32 and cu_seqlens.shape == (num_seqs + 1,),
        f"cu_seqlens must be [{num_seqs + 1}] int32 and context_lens int32, not {tuple(cu_seqlens.shape)} of "
        f"{cu_seqlens.dtype} and {context_lens.dtype}",
    )
    if block_tables is None:
        require(
            name,
            k.dim() == 3 and k.shape[0] == tokens,
            f"packed keys must be [{tokens}, Hkv, {d}], not {tuple(k.shape)}",
        )
        k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (k, v))
    else:
        require(
            name,
            block_tables.dtype is torch.int32
            and block_tables.shape[0] == num_seqs
            and block_tables.stride(1) == 1,
            f"block_tables must be [{num_seqs}, B] int32, not {tuple(block_tables.shape)} of {block_tables.dtype}",
        )
        require(
            name,
            k.dim() == 4 and k.is_contiguous() and v.is_contiguous(),
            f"the cache must be a contiguous [num_blocks, block_size, Hkv, D], not {tuple(k.shape)}",
        )
    return q if q.stride()[1:] == (d, 1) else q.contiguous(), k, v


def _check_scales(operation: str, cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """float8 keys and values come with a scale for each head, others without."""
    for scales in (k_scale, v_scale):
        require(
            operation,
            (scales is not None) == (cache.dtype is FP8_DTYPE),
            f"k_scale and v_scale belong to a cache of {FP8_DTYPE}, and only to it; the cache is of {cache.dtype}",
        )
        require(
            operation,
            scales is None
            or (
                scales.dtype is torch.float32
                and scales.shape == cache.shape[-2:-1]
                and scales.is_contiguous()
            ),
            f"k_scale and v_scale must be contiguous [{cache.shape[-2]}] of float32",
        )


def _described(x: Tensor) -> bool:
    """Whether packed keys can be read by a tensor descriptor."""
    return (
        has_tma(x.device)
        and x.data_ptr() % ALIGNMENT == 0
        and x.stride(0) * x.element_size() % ALIGNMENT == 0
    )


def _tiles_of(x: Tensor, tile: Tile, dim: int) -> TensorDescriptor:
    """Packed keys [T, Hkv, D] as rows of Hkv · D: a block may read into the next head, whose columns multiply
    zeros of q (keys) or make columns that are not stored (values)."""
    rows, heads, d = x.shape
    return TensorDescriptor(x, [rows, heads * d], [x.stride(0), 1], [tile.keys, dim])


@triton.jit
def _store_slot(source, scales, cache, index, inside, HEAD_DIM: tl.constexpr, FP8: tl.constexpr):
    value = tl.load(source + index, inside)
    if FP8:
        scale = tl.load(scales + index // HEAD_DIM, inside, 1.0)
        value = tl.div_rn(value.to(tl.float32), scale)
        value = tl.clamp(value, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    tl.store(cache + index, value, inside)


@triton.jit
def write_cache_kernel(
    k, v, slots, k_cache, v_cache, k_scale, v_scale, tickets, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
    TICKETS: tl.constexpr, TICKET_BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's heads to its slot. Grid: (T,)."""
    token = tl.program_id(0).to(tl.int64)
    if TICKETS > 0:
        index = tl.arange(0, TICKET_BLOCK)
        tl.store(tickets + token * TICKETS + index, tl.zeros((TICKET_BLOCK,), tl.int32), index < TICKETS)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    for first in tl.static_range(0, WIDTH, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < WIDTH
        _store_slot(k + token * k_stride, k_scale, k_cache + slot * WIDTH, index, inside, HEAD_DIM, FP8)
        _store_slot(v + token * v_stride, v_scale, v_cache + slot * WIDTH, index, inside, HEAD_DIM, FP8)


def write_cache(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Copies token t's key and value to slot slots[t] (block * block_size + offset); a negative slot is skipped.

    Args:
        k: [T, Hkv, D]; tokens may be strided.
        v: [T, Hkv, D] likewise.
        slots: [T] int64. Slots are trusted to lie inside the cache.
        k_cache: [num_blocks, block_size, Hkv, D] in k's dtype or float8_e4m3fn, contiguous.
        v_cache: likewise.
        k_scale: [Hkv] float32, above 0; float8 stores k / k_scale, clamped to its range. With float8 only, where it
            is required.
        v_scale: likewise.
        tickets: [T, *] int32, contiguous, which becomes zero: the counters of an attention kernel that follows.

    Raises:
        BackendError: a dtype, shape or layout that the kernel does not take.
    """
    name = "write_cache"
    tokens, heads, d = k.shape
    require(
        name,
        v.shape == k.shape
        and v.dtype is k.dtype
        and v_cache.dtype is k_cache.dtype
        and k_cache.dtype in (k.dtype, FP8_DTYPE),
        f"k, v and the caches differ: {k.dtype} {tuple(k.shape)}, {v.dtype} {tuple(v.shape)}, {k_cache.dtype}",
    )
    require(
        name,
        k_cache.shape[2:] == (heads, d)
        and v_cache.shape == k_cache.shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous(),
        f"cache {tuple(k_cache.shape)} must be contiguous and hold heads of {tuple(k.shape)}",
    )
    require(
        name,
        slots.dtype is torch.int64 and slots.shape == (tokens,),
        f"slots must be [{tokens}] int64, not {tuple(slots.shape)} of {slots.dtype}",
    )
    _check_scales(name, k_cache, k_scale, v_scale)
    k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (k, v))
    count = 0 if tickets is None else tickets.shape[1]
    if tokens:
        with on_device(k):
            write_cache_kernel[(tokens,)](
                k, v, slots.contiguous(), k_cache, v_cache, k_scale, v_scale, tickets, k.stride(0), v.stride(0),
                HEAD_DIM=d, WIDTH=heads * d, BLOCK=min(1024, triton.next_power_of_2(heads * d)),
                FP8=k_scale is not None, TICKETS=count, TICKET_BLOCK=triton.next_power_of_2(max(count, 1)),
            )  # fmt: skip
