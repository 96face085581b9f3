"""Flash attention backward for Hopper in Gluon: a warp that loads by TMA, warpgroups that compute.

The two kernels of `flash_backward`: dK and dV by tiles of keys, dQ by tiles of queries. Of the keys' tile everything is
transposed (Sᵀ = K Qᵀ), so that P and dS are left in registers as the products of dV and dK take them. Every product
has been waited for when a block ends: the other warpgroups keep the matrix units busy meanwhile, and what is left
running from one turn of a loop into the next, the assembler would run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mainspring.ops.triton.flash_gluon_forward import (
    PERSISTENT_BLOCKS,
    HopperTile,
    head_rows,
    hopper_padded,
    item_of,
    key_blocks,
    locate,
    rounded,
    share_of,
    store_rows,
    tanh,
    tiles_of,
    tma_load,
)
from mainspring.ops.triton.support import multiprocessors


@dataclass(frozen=True)
class HopperBackwardTiles:
    """In the first kernel keys are the rows and queries are walked over, in the second the other way round."""

    dkdv: HopperTile
    dq: HopperTile


BACKWARD_TILES = {
    64: HopperBackwardTiles(HopperTile(64, 64, 2, 2), HopperTile(64, 128, 2, 2)),
    128: HopperBackwardTiles(HopperTile(64, 64, 2, 2), HopperTile(64, 64, 2, 2)),
}


@gluon.jit
def _weights(scores, logarithm, seen, factor, inner, MASKED: gl.constexpr, SOFTCAP: gl.constexpr):
    """(P, what a score's gradient is multiplied by besides) from q·k."""
    slope = scores
    if SOFTCAP:
        scores = tanh(scores * inner)
        slope = 1.0 - scores * scores
    p = gl.exp2(scores * factor - logarithm)
    if MASKED:
        p = gl.where(seen, p, 0.0)
    return p, slope


@gluon.jit
def _query_blocks(
    column0,
    count,
    length,
    window,
    SIZE: gl.constexpr,
    WALK: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
):
    """(first block of queries that see keys column0 .. column0 + SIZE, how many need a mask, how many there are).

    They are walked in the order of `_query_block`, those that need a mask first.
    """
    lead = count - length  # position of the first query
    low = 0
    high = length
    diagonal = 0
    if CAUSAL:
        low = gl.maximum(column0 - lead, 0) // WALK
        diagonal = gl.maximum((gl.maximum(column0 + SIZE - 1 - lead, 0) + WALK - 1) // WALK - low, 0)
    if WINDOWED:
        high = gl.minimum(length, gl.minimum(column0 + SIZE, count) - 1 + window - lead)
    blocks = gl.maximum((gl.maximum(high, 0) + WALK - 1) // WALK - low, 0)
    if column0 >= count:
        blocks = 0
    masked = gl.minimum(diagonal + 1, blocks)
    if WINDOWED:
        masked = blocks
    return low, masked, blocks


@gluon.jit
def _query_block(i, low, blocks):
    """The i-th block of queries to walk: first the last one, which the sequence's end may cut, then from low on."""
    return low + gl.where(i == 0, blocks, i) - 1


@gluon.jit
def _terms_of(start, s):
    """Where a sequence's row terms begin: see `row_terms`."""
    return ((start + 3) // 4 + s) * 4


@gluon.jit
def _dkdv_produce(
    q_desc, k_desc, v_desc, do_desc, terms_desc, q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, kv_ready,
    kv_empty, q_ready, q_empty, do_ready, do_empty, cu_q, cu_k, window, num_seqs, group, plane, pitch, tiles, each,
    turns, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Loads each tile's keys and values, then for every head of the group blocks of queries."""
    TILES: gl.constexpr = k_smem.shape[0] // GROUPS
    ROWS: gl.constexpr = k_smem.shape[1]
    STAGES: gl.constexpr = q_smem.shape[0]
    WALK: gl.constexpr = q_smem.shape[1]
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        kv_head = item // tiles
        s, k_start, count, column0 = locate(item - kv_head * tiles, cu_k, num_seqs, each, GROUPS * ROWS)
        q_start = gl.load(cu_q + s)
        length = gl.load(cu_q + s + 1) - q_start
        low, _, blocks = _query_blocks(column0, count, length, window, GROUPS * ROWS, WALK, CAUSAL, WINDOWED)
        for g in gl.static_range(GROUPS):
            row = k_start + column0 + g * ROWS
            slot = turn % TILES * GROUPS + g
            mbarrier.wait(kv_empty.index(slot), turn // TILES & 1 ^ 1)
            mbarrier.expect(kv_ready.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma_load(k_desc, [row, kv_head, 0], kv_ready.index(slot), k_smem.index(slot))
            tma_load(v_desc, [row, kv_head, 0], kv_ready.index(slot), v_smem.index(slot))
        terms = _terms_of(q_start, s)
        for m in range(blocks * group):
            member = m // blocks
            first = _query_block(m - member * blocks, low, blocks) * WALK
            head = kv_head * group + member
            place = head * pitch + terms + first
            stage = (n + m) % STAGES
            phase = (n + m) // STAGES & 1 ^ 1
            mbarrier.wait(q_empty.index(stage), phase)
            mbarrier.expect(q_ready.index(stage), q_desc.block_type.nbytes + terms_desc.block_type.nbytes)
            tma_load(q_desc, [q_start + first, head, 0], q_ready.index(stage), q_smem.index(stage))
            tma_load(terms_desc, [place], q_ready.index(stage), log_smem.index(stage))
            mbarrier.wait(do_empty.index(stage), phase)
            mbarrier.expect(do_ready.index(stage), do_desc.block_type.nbytes + terms_desc.block_type.nbytes)
            tma_load(do_desc, [q_start + first, head, 0], do_ready.index(stage), do_smem.index(stage))
            tma_load(terms_desc, [plane + place], do_ready.index(stage), delta_smem.index(stage))
        n += blocks * group


@gluon.jit
def _dkdv_step(
    k, v, q_smem, do_smem, log_smem, delta_smem, q_ready, q_empty, do_ready, do_empty, dk, dv, n, first, length, lead,
    keys, factor, inner, window, MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The n-th block, queries first .., into dK and dV."""
    STAGES: gl.constexpr = q_smem.shape[0]
    WALK: gl.constexpr = q_smem.shape[1]
    ROWS: gl.constexpr = k.shape[0]
    SHAPE: gl.constexpr = (WALK, k.shape[1])
    ALONG: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    stage = n % STAGES
    phase = n // STAGES & 1
    queries = q_smem.index(stage).reshape(SHAPE)
    do = do_smem.index(stage).reshape(SHAPE)
    none = gl.zeros([ROWS, WALK], gl.float32, S_LAYOUT)
    mbarrier.wait(q_ready.index(stage), phase)
    scores = warpgroup_mma(k, queries.permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(do_ready.index(stage), phase)
    dp = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
    logarithm = gl.expand_dims(log_smem.index(stage).load(ALONG), 0)
    scores = warpgroup_mma_wait(1, deps=[scores])
    seen = keys
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, WALK, ALONG), 0)
        right = length - first + keys * 0
        if WINDOWED:
            right = gl.minimum(right, keys + (window - lead - first))
        seen = columns < gl.expand_dims(right, 1)
        if CAUSAL:
            seen = seen & (columns >= gl.expand_dims(keys - (lead + first), 1))
    p, slope = _weights(scores, logarithm, seen, factor, inner, MASKED, SOFTCAP)
    p16 = gl.convert_layout(rounded(p, q_smem.dtype), P_LAYOUT, assert_trivial=True)
    dv = warpgroup_mma(p16, do, dv, is_async=True)
    delta = gl.expand_dims(delta_smem.index(stage).load(ALONG), 0)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slope
    if MASKED:
        ds = gl.where(seen, ds, 0.0)  # beyond the sequence's end delta may be anything
    ds16 = gl.convert_layout(rounded(ds, q_smem.dtype), P_LAYOUT, assert_trivial=True)
    dk = warpgroup_mma(ds16, queries, dk, is_async=True)
    dv, p16 = warpgroup_mma_wait(1, deps=[dv, p16])
    mbarrier.arrive(do_empty.index(stage), count=1)
    dk, ds16 = warpgroup_mma_wait(0, deps=[dk, ds16])
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _dkdv_consume(
    q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty, do_ready,
    do_empty, dk_out, dv_out, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads, tiles, each, turns,
    HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its keys of each tile against every block of queries."""
    GROUPS: gl.constexpr = out_smem.shape[0]
    TILES: gl.constexpr = k_smem.shape[0] // GROUPS
    ROWS: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[3]
    WALK: gl.constexpr = q_smem.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WALK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        kv_head = item // tiles
        s, k_start, count, column0 = locate(item - kv_head * tiles, cu_k, num_seqs, each, GROUPS * ROWS)
        length = gl.load(cu_q + s + 1) - gl.load(cu_q + s)
        low, masked, blocks = _query_blocks(
            column0, count, length, window, GROUPS * ROWS, WALK, CAUSAL, WINDOWED
        )
        lead = count - length
        first_key = column0 + GROUP * ROWS
        keys = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        dk = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
        dv = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
        slot = turn % TILES * GROUPS + GROUP
        k = k_smem.index(slot).reshape((ROWS, DIM))
        v = v_smem.index(slot).reshape((ROWS, DIM))
        mbarrier.wait(kv_ready.index(slot), turn // TILES & 1)
        for _ in range(group):
            for i in range(masked):
                dk, dv = _dkdv_step(
                    k, v, q_smem, do_smem, log_smem, delta_smem, q_ready, q_empty, do_ready, do_empty, dk, dv, n + i,
                    _query_block(i, low, blocks) * WALK, length, lead, keys, factor, inner, window, True, CAUSAL,
                    WINDOWED, SOFTCAP, S_LAYOUT, P_LAYOUT,
                )  # fmt: skip
            if not WINDOWED:
                for i in range(masked, blocks):
                    dk, dv = _dkdv_step(
                        k, v, q_smem, do_smem, log_smem, delta_smem, q_ready, q_empty, do_ready, do_empty, dk, dv,
                        n + i, _query_block(i, low, blocks) * WALK, length, lead, keys, factor, inner, window, False,
                        CAUSAL, WINDOWED, SOFTCAP, S_LAYOUT, P_LAYOUT,
                    )  # fmt: skip
            n += blocks
        mbarrier.arrive(kv_empty.index(slot), count=1)
        staging = out_smem.index(GROUP).reshape((ROWS, DIM))
        store_rows(dk * scale, staging, dk_out, k_start, first_key, count, kv_head, kv_heads, HEAD_DIM)
        store_rows(dv, staging, dv_out, k_start, first_key, count, kv_head, kv_heads, HEAD_DIM)


@gluon.jit(do_not_specialize=["window", "num_seqs", "group", "kv_heads", "plane", "pitch", "tiles", "each"])
def dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, terms_desc, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group,
    kv_heads, plane, pitch, tiles, each, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr,
    WALK: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items are tiles of GROUPS · ROWS keys of a key head. Grid: (programs), as many as items or fewer."""
    turns = share_of(tiles * kv_heads)
    dtype: gl.constexpr = q_desc.dtype
    TILES: gl.constexpr = 2  # whose keys and values are here at a time
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [TILES * GROUPS, ROWS, 1, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [TILES * GROUPS, ROWS, 1, DIM], v_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, 1, DIM], k_desc.layout)
    log_smem = gl.allocate_shared_memory(gl.float32, [STAGES, WALK], terms_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, WALK], terms_desc.layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [TILES * GROUPS, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [TILES * GROUPS, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(TILES * GROUPS):
        mbarrier.init(kv_ready.index(g), count=1)
        mbarrier.init(kv_empty.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
        mbarrier.init(do_empty.index(i), count=GROUPS)
    if GROUPS == 2:
        gl.warp_specialize([
            (_dkdv_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_dkdv_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_dkdv_produce, (
                q_desc, k_desc, v_desc, do_desc, terms_desc, q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem,
                kv_ready, kv_empty, q_ready, q_empty, do_ready, do_empty, cu_q, cu_k, window, num_seqs, group, plane,
                pitch, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_dkdv_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_dkdv_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_dkdv_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 2,
            )),
            (_dkdv_produce, (
                q_desc, k_desc, v_desc, do_desc, terms_desc, q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem,
                kv_ready, kv_empty, q_ready, q_empty, do_ready, do_empty, cu_q, cu_k, window, num_seqs, group, plane,
                pitch, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


@gluon.jit
def _dq_produce(
    q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, q_ready, q_empty, k_ready, k_empty, v_ready,
    v_empty, cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """Loads each tile's queries and dO, then its blocks of keys and values, the last block first."""
    TILES: gl.constexpr = q_smem.shape[0] // GROUPS
    ROWS: gl.constexpr = q_smem.shape[1]
    STAGES: gl.constexpr = k_smem.shape[0]
    WALK: gl.constexpr = k_smem.shape[1]
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        head = item // tiles
        tile = tiles - 1 - (item - head * tiles)  # under a causal mask the longest first
        s, start, length, row0 = locate(tile, cu_q, num_seqs, each, GROUPS * ROWS)
        k_start = gl.load(cu_k + s)
        keys = gl.load(cu_k + s + 1) - k_start
        last, _, blocks = key_blocks(row0, length, keys, window, GROUPS * ROWS, WALK, CAUSAL, WINDOWED)
        for g in gl.static_range(GROUPS):
            row = start + row0 + g * ROWS
            slot = turn % TILES * GROUPS + g
            mbarrier.wait(q_empty.index(slot), turn // TILES & 1 ^ 1)
            mbarrier.expect(q_ready.index(slot), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            tma_load(q_desc, [row, head, 0], q_ready.index(slot), q_smem.index(slot))
            tma_load(do_desc, [row, head, 0], q_ready.index(slot), do_smem.index(slot))
        for i in range(blocks):
            stage = (n + i) % STAGES
            phase = (n + i) // STAGES & 1 ^ 1
            row = k_start + (last - i) * WALK
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [row, head // group, 0], k_ready.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [row, head // group, 0], v_ready.index(stage), v_smem.index(stage))
        n += blocks


@gluon.jit
def _dq_step(
    q, do, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, dq, logarithm, delta, n, first, keys, positions, factor,
    inner, window, MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The n-th block, keys first .., into dQ."""
    STAGES: gl.constexpr = k_smem.shape[0]
    WALK: gl.constexpr = k_smem.shape[1]
    ROWS: gl.constexpr = q.shape[0]
    SHAPE: gl.constexpr = (WALK, q.shape[1])
    stage = n % STAGES
    phase = n // STAGES & 1
    k = k_smem.index(stage).reshape(SHAPE)
    v = v_smem.index(stage).reshape(SHAPE)
    none = gl.zeros([ROWS, WALK], gl.float32, S_LAYOUT)
    mbarrier.wait(k_ready.index(stage), phase)
    scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(stage), phase)
    dp = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    seen = positions
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, WALK, gl.SliceLayout(0, S_LAYOUT)), 0)
        right = keys - 1 - first + positions * 0
        if CAUSAL:
            right = gl.minimum(right, positions - first)
        seen = columns <= gl.expand_dims(right, 1)
        if WINDOWED:
            seen = seen & (columns > gl.expand_dims(positions - window - first, 1))
    p, slope = _weights(scores, gl.expand_dims(logarithm, 1), seen, factor, inner, MASKED, SOFTCAP)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = p * (dp - gl.expand_dims(delta, 1))
    if SOFTCAP:
        ds = ds * slope
    ds16 = gl.convert_layout(rounded(ds, k_smem.dtype), P_LAYOUT, assert_trivial=True)
    dq = warpgroup_mma(ds16, k, dq, is_async=True)
    dq, ds16 = warpgroup_mma_wait(0, deps=[dq, ds16])
    mbarrier.arrive(k_empty.index(stage), count=1)
    return dq


@gluon.jit
def _dq_consume(
    q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, terms, dq_out,
    cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each, turns,
    HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its queries of each tile against every block of keys."""
    GROUPS: gl.constexpr = out_smem.shape[0]
    TILES: gl.constexpr = q_smem.shape[0] // GROUPS
    ROWS: gl.constexpr = q_smem.shape[1]
    DIM: gl.constexpr = q_smem.shape[3]
    WALK: gl.constexpr = k_smem.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WALK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        head = item // tiles
        tile = tiles - 1 - (item - head * tiles)
        s, start, length, row0 = locate(tile, cu_q, num_seqs, each, GROUPS * ROWS)
        keys = gl.load(cu_k + s + 1) - gl.load(cu_k + s)
        last, masked, blocks = key_blocks(row0, length, keys, window, GROUPS * ROWS, WALK, CAUSAL, WINDOWED)
        first_row = row0 + GROUP * ROWS
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        positions = keys - length + rows
        place = terms + head.to(gl.int64) * pitch + _terms_of(start, s) + rows
        logarithm = gl.load(place, rows < length, float("inf"))
        delta = gl.load(place + plane, rows < length, 0.0)
        dq = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
        slot = turn % TILES * GROUPS + GROUP
        q = q_smem.index(slot).reshape((ROWS, DIM))
        do = do_smem.index(slot).reshape((ROWS, DIM))
        mbarrier.wait(q_ready.index(slot), turn // TILES & 1)
        for i in range(masked):
            dq = _dq_step(
                q, do, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, dq, logarithm, delta, n + i,
                (last - i) * WALK, keys, positions, factor, inner, window, True, CAUSAL, WINDOWED, SOFTCAP, S_LAYOUT,
                P_LAYOUT,
            )  # fmt: skip
        if not WINDOWED:
            for i in range(masked, blocks):
                dq = _dq_step(
                    q, do, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, dq, logarithm, delta, n + i,
                    (last - i) * WALK, keys, positions, factor, inner, window, False, CAUSAL, WINDOWED, SOFTCAP,
                    S_LAYOUT, P_LAYOUT,
                )  # fmt: skip
        n += blocks
        mbarrier.arrive(q_empty.index(slot), count=1)
        staging = out_smem.index(GROUP).reshape((ROWS, DIM))
        store_rows(dq * scale, staging, dq_out, start, first_row, length, head, heads, HEAD_DIM)


@gluon.jit(do_not_specialize=["window", "num_seqs", "group", "heads", "plane", "pitch", "tiles", "each"])
def dq_kernel(
    q_desc, k_desc, v_desc, do_desc, terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, heads, plane,
    pitch, tiles, each, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, WALK: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items are tiles of GROUPS · ROWS queries of a head. Grid: (programs), as many as items or fewer."""
    turns = share_of(tiles * heads)
    dtype: gl.constexpr = q_desc.dtype
    TILES: gl.constexpr = 2  # whose queries and dO are here at a time
    q_smem = gl.allocate_shared_memory(dtype, [TILES * GROUPS, ROWS, 1, DIM], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [TILES * GROUPS, ROWS, 1, DIM], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], v_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, 1, DIM], q_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [TILES * GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [TILES * GROUPS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(TILES * GROUPS):
        mbarrier.init(q_ready.index(g), count=1)
        mbarrier.init(q_empty.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    if GROUPS == 2:
        gl.warp_specialize([
            (_dq_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_dq_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_dq_produce, (
                q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, q_ready, q_empty, k_ready, k_empty,
                v_ready, v_empty, cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_dq_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_dq_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_dq_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 2,
            )),
            (_dq_produce, (
                q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, q_ready, q_empty, k_ready, k_empty,
                v_ready, v_empty, cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cu_q: Tensor,
    cu_k: Tensor, *, max_q: int, max_k: int, scale: float, factor: float, inner: float, causal: bool, window: int,
    tiles: HopperBackwardTiles | None = None, persistent: bool | None = None,
) -> None:  # fmt: skip
    """Fills dq, dk and dv. Arguments as those of `flash_attention_backward`, checked, with `serves` true; terms as
    `row_terms` gives them, factor and inner as for `launch_forward`."""
    d, heads, kv_heads = q.shape[2], q.shape[1], k.shape[1]
    dim = hopper_padded(d)
    tiles = tiles or BACKWARD_TILES[dim]
    num_seqs, pitch, processors = cu_q.shape[0] - 1, terms.shape[2], multiprocessors(q.device)
    numbers = (cu_q, cu_k, scale, factor, inner, window, num_seqs, heads // kv_heads)
    constants = {"HEAD_DIM": d, "DIM": dim, "CAUSAL": causal, "WINDOWED": window > 0, "SOFTCAP": inner > 0}

    tile = tiles.dkdv
    count, each = tiles_of(k.shape[0], max_k, num_seqs, tile.rows * tile.groups)
    items = count * kv_heads
    few = max_q <= PERSISTENT_BLOCKS * tile.walk if persistent is None else persistent
    flat = TensorDescriptor(terms, [terms.numel()], [1], [tile.walk], gl.NVMMASharedLayout(0, 32, 1))
    dkdv_kernel[(min(items, processors) if few else items,)](
        head_rows(q, tile.walk), head_rows(k, tile.rows), head_rows(v, tile.rows), head_rows(dout, tile.walk), flat, dk,
        dv, *numbers, kv_heads, heads * pitch, pitch, count, each, ROWS=tile.rows, WALK=tile.walk, GROUPS=tile.groups,
        STAGES=tile.stages, REGISTERS=tile.registers, **constants, num_warps=4,
    )  # fmt: skip

    tile = tiles.dq
    count, each = tiles_of(q.shape[0], max_q, num_seqs, tile.rows * tile.groups)
    items = count * heads
    few = max_k <= PERSISTENT_BLOCKS * tile.walk if persistent is None else persistent
    dq_kernel[(min(items, processors) if few else items,)](
        head_rows(q, tile.rows), head_rows(k, tile.walk), head_rows(v, tile.walk), head_rows(dout, tile.rows), terms,
        dq, *numbers, heads, heads * pitch, pitch, count, each, ROWS=tile.rows, WALK=tile.walk, GROUPS=tile.groups,
        STAGES=tile.stages, REGISTERS=tile.registers, **constants, num_warps=4,
    )  # fmt: skip
