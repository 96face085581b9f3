"""dK and dV for Hopper in Gluon: a warp that loads by TMA, warpgroups that compute.

Everything is transposed (Sᵀ = K Qᵀ), so that P and dS are left in registers as the products of dV and dK take them.
A warpgroup has keys of its own; of heads wider than NARROW, whose dK and dV no warpgroup could hold, all have the same
keys and columns of their own, and each computes the scores for itself. Every product has been waited for when a block
ends: the other warpgroups keep the matrix units busy meanwhile, and what is left running from one turn of a loop into
the next, the assembler would run one after the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mainspring.ops.triton.flash_gluon import (
    item_of,
    locate,
    rounded,
    share_of,
    store_rows,
    tanh,
    tma_load,
)

NARROW = gl.constexpr(128)


@gluon.jit
def weights_of(scores, logarithm, seen, factor, inner, MASKED: gl.constexpr, SOFTCAP: gl.constexpr):
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
def terms_of(start, s):
    """Where a sequence's row terms begin: see `row_terms`."""
    return ((start + 3) // 4 + s) * 4


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
def _produce(
    q_desc, k_desc, v_desc, do_desc, terms_desc, q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, kv_ready,
    kv_empty, q_ready, q_empty, do_ready, do_empty, cu_q, cu_k, window, num_seqs, group, plane, pitch, tiles, each,
    turns, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Loads each tile's keys and values, then for every head of the group blocks of queries."""
    OWN: gl.constexpr = 1 if k_smem.shape[3] > NARROW else GROUPS
    TILES: gl.constexpr = k_smem.shape[0] // OWN
    ROWS: gl.constexpr = k_smem.shape[1]
    STAGES: gl.constexpr = q_smem.shape[0]
    WALK: gl.constexpr = q_smem.shape[1]
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        kv_head = item // tiles
        s, k_start, count, column0 = locate(item - kv_head * tiles, cu_k, num_seqs, each, OWN * ROWS)
        q_start = gl.load(cu_q + s)
        length = gl.load(cu_q + s + 1) - q_start
        low, _, blocks = _query_blocks(column0, count, length, window, OWN * ROWS, WALK, CAUSAL, WINDOWED)
        for g in gl.static_range(OWN):
            row = k_start + column0 + g * ROWS
            slot = turn % TILES * OWN + g
            mbarrier.wait(kv_empty.index(slot), turn // TILES & 1 ^ 1)
            mbarrier.expect(kv_ready.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma_load(k_desc, [row, kv_head, 0], kv_ready.index(slot), k_smem.index(slot))
            tma_load(v_desc, [row, kv_head, 0], kv_ready.index(slot), v_smem.index(slot))
        terms = terms_of(q_start, s)
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
def columns_of(tile, first: gl.constexpr, count: gl.constexpr):
    """Columns first .. first + count of a tile in shared memory."""
    result = tile
    if count < tile.shape[1]:
        result = tile.slice(first, count, dim=1)
    return result


@gluon.jit
def _step(
    k, v, q_smem, do_smem, log_smem, delta_smem, q_ready, q_empty, do_ready, do_empty, dk, dv, n, first, length, lead,
    keys, factor, inner, window, MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The n-th block, queries first .., into dK and dV, of which dk and dv hold columns FIRST .. of a head."""
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
    p, slope = weights_of(scores, logarithm, seen, factor, inner, MASKED, SOFTCAP)
    p16 = gl.convert_layout(rounded(p, q_smem.dtype), P_LAYOUT, assert_trivial=True)
    dv = warpgroup_mma(p16, columns_of(do, FIRST, dv.shape[1]), dv, is_async=True)
    delta = gl.expand_dims(delta_smem.index(stage).load(ALONG), 0)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slope
    if MASKED:
        ds = gl.where(seen, ds, 0.0)  # beyond the sequence's end delta may be anything
    ds16 = gl.convert_layout(rounded(ds, q_smem.dtype), P_LAYOUT, assert_trivial=True)
    dk = warpgroup_mma(ds16, columns_of(queries, FIRST, dk.shape[1]), dk, is_async=True)
    dv, p16 = warpgroup_mma_wait(1, deps=[dv, p16])
    mbarrier.arrive(do_empty.index(stage), count=1)
    dk, ds16 = warpgroup_mma_wait(0, deps=[dk, ds16])
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consume(
    q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty, do_ready,
    do_empty, dk_out, dv_out, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads, tiles, each, turns,
    HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its keys of each tile, or its columns of dK and dV, against every block of queries."""
    GROUPS: gl.constexpr = out_smem.shape[0]
    WIDE: gl.constexpr = k_smem.shape[3] > NARROW
    OWN: gl.constexpr = 1 if WIDE else GROUPS
    KEY_GROUP: gl.constexpr = 0 if WIDE else GROUP
    TILES: gl.constexpr = k_smem.shape[0] // OWN
    ROWS: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[3]
    WALK: gl.constexpr = q_smem.shape[1]
    COLUMNS: gl.constexpr = out_smem.shape[3]
    FIRST: gl.constexpr = GROUP * COLUMNS if WIDE else 0
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WALK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        kv_head = item // tiles
        s, k_start, count, column0 = locate(item - kv_head * tiles, cu_k, num_seqs, each, OWN * ROWS)
        length = gl.load(cu_q + s + 1) - gl.load(cu_q + s)
        low, masked, blocks = _query_blocks(
            column0, count, length, window, OWN * ROWS, WALK, CAUSAL, WINDOWED
        )
        lead = count - length
        first_key = column0 + KEY_GROUP * ROWS
        keys = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        dk = gl.zeros([ROWS, COLUMNS], gl.float32, O_LAYOUT)
        dv = gl.zeros([ROWS, COLUMNS], gl.float32, O_LAYOUT)
        slot = turn % TILES * OWN + KEY_GROUP
        k = k_smem.index(slot).reshape((ROWS, DIM))
        v = v_smem.index(slot).reshape((ROWS, DIM))
        mbarrier.wait(kv_ready.index(slot), turn // TILES & 1)
        for _ in range(group):
            for i in range(masked):
                dk, dv = _step(
                    k, v, q_smem, do_smem, log_smem, delta_smem, q_ready, q_empty, do_ready, do_empty, dk, dv, n + i,
                    _query_block(i, low, blocks) * WALK, length, lead, keys, factor, inner, window, True, CAUSAL,
                    WINDOWED, SOFTCAP, S_LAYOUT, P_LAYOUT, FIRST,
                )  # fmt: skip
            if not WINDOWED:
                for i in range(masked, blocks):
                    dk, dv = _step(
                        k, v, q_smem, do_smem, log_smem, delta_smem, q_ready, q_empty, do_ready, do_empty, dk, dv,
                        n + i, _query_block(i, low, blocks) * WALK, length, lead, keys, factor, inner, window, False,
                        CAUSAL, WINDOWED, SOFTCAP, S_LAYOUT, P_LAYOUT, FIRST,
                    )  # fmt: skip
            n += blocks
        mbarrier.arrive(kv_empty.index(slot), count=1)
        staging = out_smem.index(GROUP).reshape((ROWS, COLUMNS))
        store_rows(dk * scale, staging, dk_out, k_start, first_key, count, kv_head, kv_heads, HEAD_DIM, FIRST)
        store_rows(dv, staging, dv_out, k_start, first_key, count, kv_head, kv_heads, HEAD_DIM, FIRST)


@gluon.jit(do_not_specialize=["window", "num_seqs", "group", "kv_heads", "plane", "pitch", "tiles", "each"])
def dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, terms_desc, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group,
    kv_heads, plane, pitch, tiles, each, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr,
    WALK: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items are tiles of GROUPS · ROWS keys of a key head, of ROWS where heads are wide. Grid: (programs), as many as
    items or fewer."""
    turns = share_of(tiles * kv_heads)
    dtype: gl.constexpr = q_desc.dtype
    WIDE: gl.constexpr = DIM > NARROW
    OWN: gl.constexpr = 1 if WIDE else GROUPS
    TILES: gl.constexpr = 1 if WIDE else 2  # whose keys and values are here at a time
    COLUMNS: gl.constexpr = DIM // GROUPS if WIDE else DIM
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, WALK, 1, DIM], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [TILES * OWN, ROWS, 1, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [TILES * OWN, ROWS, 1, DIM], v_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, 1, COLUMNS], k_desc.layout)
    log_smem = gl.allocate_shared_memory(gl.float32, [STAGES, WALK], terms_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, WALK], terms_desc.layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [TILES * OWN, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [TILES * OWN, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(TILES * OWN):
        mbarrier.init(kv_ready.index(g), count=1)
        mbarrier.init(kv_empty.index(g), count=GROUPS // OWN)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(do_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
        mbarrier.init(do_empty.index(i), count=GROUPS)
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, do_desc, terms_desc, q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem,
                kv_ready, kv_empty, q_ready, q_empty, do_ready, do_empty, cu_q, cu_k, window, num_seqs, group, plane,
                pitch, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 1,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem, out_smem, kv_ready, kv_empty, q_ready, q_empty,
                do_ready, do_empty, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, group, kv_heads,
                tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED, SOFTCAP, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, do_desc, terms_desc, q_smem, k_smem, v_smem, do_smem, log_smem, delta_smem,
                kv_ready, kv_empty, q_ready, q_empty, do_ready, do_empty, cu_q, cu_k, window, num_seqs, group, plane,
                pitch, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
