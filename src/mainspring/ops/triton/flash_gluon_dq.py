"""dQ for Hopper in Gluon: a warp that loads by TMA, warpgroups that compute, each with queries of its own."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mainspring.ops.triton.flash_gluon import (
    item_of,
    key_blocks,
    locate,
    rounded,
    share_of,
    store_rows,
    tma_load,
)
from mainspring.ops.triton.flash_gluon_dkdv import terms_of, weights_of


@gluon.jit
def _produce(
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
def _step(
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
    p, slope = weights_of(scores, gl.expand_dims(logarithm, 1), seen, factor, inner, MASKED, SOFTCAP)
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
def _consume(
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
        place = terms + head.to(gl.int64) * pitch + terms_of(start, s) + rows
        logarithm = gl.load(place, rows < length, float("inf"))
        delta = gl.load(place + plane, rows < length, 0.0)
        dq = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
        slot = turn % TILES * GROUPS + GROUP
        q = q_smem.index(slot).reshape((ROWS, DIM))
        do = do_smem.index(slot).reshape((ROWS, DIM))
        mbarrier.wait(q_ready.index(slot), turn // TILES & 1)
        for i in range(masked):
            dq = _step(
                q, do, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, dq, logarithm, delta, n + i,
                (last - i) * WALK, keys, positions, factor, inner, window, True, CAUSAL, WINDOWED, SOFTCAP, S_LAYOUT,
                P_LAYOUT,
            )  # fmt: skip
        if not WINDOWED:
            for i in range(masked, blocks):
                dq = _step(
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
    SOFTCAP: gl.constexpr, STAGED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items are tiles of GROUPS · ROWS queries of a head. Grid: (programs), as many as items or fewer; as many, unless
    STAGED."""
    turns = share_of(tiles * heads)
    dtype: gl.constexpr = q_desc.dtype
    TILES: gl.constexpr = 2 if STAGED else 1  # whose queries and dO are here at a time
    q_smem = gl.allocate_shared_memory(dtype, [TILES * GROUPS, ROWS, 1, DIM], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [TILES * GROUPS, ROWS, 1, DIM], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], v_desc.layout)
    if STAGED:  # noqa: SIM108 - the condition is the compiler's
        out_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, 1, DIM], q_desc.layout)
    else:
        out_smem = q_smem
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
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, q_ready, q_empty, k_ready, k_empty,
                v_ready, v_empty, cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, out_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, heads, plane, pitch, tiles, each,
                turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, q_ready, q_empty, k_ready, k_empty,
                v_ready, v_empty, cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
