"""Flash attention forward for Hopper in Gluon: a warp that loads by TMA, warpgroups that compute.

Each computing warpgroup has rows of its own. It starts the product that gives the next block's scores, then that of
this block's values, and computes the next softmax while the latter runs (Shah et al. 2024, "FlashAttention-3",
section 3.2). Blocks of keys are walked from the last to the first, so that the masked ones come first and the long
loop needs no mask.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mainspring.ops.triton.flash_gluon import (
    HopperTile,
    head_rows,
    hopper_padded,
    item_of,
    key_blocks,
    locate,
    persists,
    rounded,
    share_of,
    store_rows,
    tanh,
    tiles_of,
    tma_load,
)
from mainspring.ops.triton.support import multiprocessors

FORWARD_TILES = {
    64: HopperTile(64, 128, 2, 2),
    128: HopperTile(64, 128, 2, 2),
    256: HopperTile(64, 64, 2, 2),
}
# For long walks over small heads: three warpgroups share a load and hide each other's exponentials.
LONG_FORWARD_TILE = HopperTile(64, 128, 3, 2, 160)
SHARED_BYTES = 226 << 10


def forward_tile(dim: int, reach: int, causal: bool) -> HopperTile:
    """The tile for a padded head size and the most keys that a query sees, by what was fastest on an H200."""
    if dim == 64 and reach > (4096 if causal else 1024):
        return LONG_FORWARD_TILE
    return FORWARD_TILES[dim]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *, max_q: int, max_k: int,
    factor: float, inner: float, causal: bool, window: int, tile: HopperTile | None = None,
    persistent: bool | None = None,
) -> None:  # fmt: skip
    """Fills out and lse. Arguments as those of `flash_attention_forward`, checked, with `serves` true; scores are
    factor · q·k in powers of two, or with inner > 0 factor · tanh(inner · q·k)."""
    tokens, heads, d = q.shape
    dim = hopper_padded(d)
    reach = min(max_k, window or max_k)
    tile = tile or forward_tile(dim, reach, causal)
    num_seqs, size = cu_q.shape[0] - 1, tile.rows * tile.groups
    tiles, each = tiles_of(tokens, max_q, num_seqs, size)
    # Where there is memory left, the next tile's queries are loaded meanwhile, and the result has a place of its own.
    staged = 2 * dim * (3 * size + 2 * tile.stages * tile.walk) <= SHARED_BYTES
    items, programs = tiles * heads, multiprocessors(q.device)
    if persistent is None:
        persistent = persists(reach, each, items, programs, causal)
    programs = min(items, programs) if staged and persistent else items
    forward_kernel[(programs,)](
        head_rows(q, tile.rows), head_rows(k, tile.walk), head_rows(v, tile.walk), out, lse, cu_q, cu_k, factor, inner,
        window, num_seqs, tokens, heads, heads // k.shape[1], tiles, each, HEAD_DIM=d, DIM=dim, ROWS=tile.rows,
        WALK=tile.walk, GROUPS=tile.groups, STAGES=tile.stages, CAUSAL=causal, WINDOWED=window > 0, SOFTCAP=inner > 0,
        STAGED=staged, REGISTERS=tile.registers, num_warps=4,
    )  # fmt: skip


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, cu_q, cu_k,
    window, num_seqs, group, tiles, each, turns, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Loads each tile's queries, then its blocks of keys and values, the last block first."""
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
            slot = turn % TILES * GROUPS + g
            mbarrier.wait(q_empty.index(slot), turn // TILES & 1 ^ 1)
            mbarrier.expect(q_ready.index(slot), q_desc.block_type.nbytes)
            tma_load(q_desc, [start + row0 + g * ROWS, head, 0], q_ready.index(slot), q_smem.index(slot))
        for i in range(blocks):
            stage = (n + i) % STAGES
            phase = (n + i) // STAGES & 1
            row = k_start + (last - i) * WALK
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [row, head // group, 0], k_ready.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [row, head // group, 0], v_ready.index(stage), v_smem.index(stage))
        n += blocks


@gluon.jit
def _softmax(
    scores, peak, total, first, keys, positions, factor, inner, window, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """(weights, new peak, new total, factor of what was summed before)."""
    if SOFTCAP:
        scores = tanh(scores * inner)
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout)), 0)
        right = keys - 1 - first + positions * 0
        if CAUSAL:
            right = gl.minimum(right, positions - first)
        seen = columns <= gl.expand_dims(right, 1)
        if WINDOWED:
            seen = seen & (columns > gl.expand_dims(positions - window - first, 1))
        scores = gl.where(seen, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    safe = new_peak
    if MASKED:
        safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(scores * factor - gl.expand_dims(safe * factor, 1))
    shrink = gl.exp2((peak - safe) * factor)
    total = total * shrink + gl.sum(weights, 1)
    return weights, new_peak, total, shrink


@gluon.jit
def _step(
    q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, acc, weights, donor, peak, total, n, first, keys, positions,
    factor, inner, window, MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of the n-th block, keys first .., beside the product of the block before.

    donor: registers for the scores that hold nothing of worth any more.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    SHAPE: gl.constexpr = (k_smem.shape[1], k_smem.shape[3])
    stage = n % STAGES
    before = (n - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
    k = k_smem.index(stage).reshape(SHAPE)
    scores = warpgroup_mma(q, k.permute((1, 0)), donor, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), (n - 1) // STAGES & 1)
    product = warpgroup_mma(weights, v_smem.index(before).reshape(SHAPE), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    donor, peak, total, shrink = _softmax(
        scores, peak, total, first, keys, positions, factor, inner, window, MASKED, CAUSAL, WINDOWED, SOFTCAP
    )
    acc, weights = warpgroup_mma_wait(0, deps=[product, weights])
    mbarrier.arrive(v_empty.index(before), count=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    acc = acc * gl.expand_dims(shrink, 1)
    weights = gl.convert_layout(rounded(donor, v_smem.dtype), P_LAYOUT, assert_trivial=True)
    return acc, weights, donor, peak, total


@gluon.jit
def _consume(
    q_smem, k_smem, v_smem, o_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out, lse, cu_q, cu_k, factor,
    inner, window, num_seqs, tokens, heads, tiles, each, turns, HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its rows of each tile against every block."""
    GROUPS: gl.constexpr = o_smem.shape[0]
    TILES: gl.constexpr = q_smem.shape[0] // GROUPS
    ROWS: gl.constexpr = q_smem.shape[1]
    DIM: gl.constexpr = q_smem.shape[3]
    STAGES: gl.constexpr = k_smem.shape[0]
    WALK: gl.constexpr = k_smem.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WALK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    n = 0
    for turn in range(turns):
        item = item_of(turn)
        head = item // tiles
        tile = tiles - 1 - (item - head * tiles)
        s, start, length, row0 = locate(tile, cu_q, num_seqs, each, GROUPS * ROWS)
        keys = gl.load(cu_k + s + 1) - gl.load(cu_k + s)
        last, masked, blocks = key_blocks(row0, length, keys, window, GROUPS * ROWS, WALK, CAUSAL, WINDOWED)
        first_row = row0 + GROUP * ROWS
        rows = first_row + gl.arange(0, ROWS, ROW_LAYOUT)
        positions = keys - length + rows
        peak = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
        total = gl.zeros([ROWS], gl.float32, ROW_LAYOUT)
        acc = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
        donor = gl.zeros([ROWS, WALK], gl.float32, S_LAYOUT)
        slot = turn % TILES * GROUPS + GROUP
        q = q_smem.index(slot).reshape((ROWS, DIM))
        mbarrier.wait(q_ready.index(slot), turn // TILES & 1)
        mbarrier.wait(k_ready.index(n % STAGES), n // STAGES & 1)
        k = k_smem.index(n % STAGES).reshape((WALK, DIM))
        scores = warpgroup_mma(q, k.permute((1, 0)), donor, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        donor, peak, total, _ = _softmax(
            scores,
            peak,
            total,
            last * WALK,
            keys,
            positions,
            factor,
            inner,
            window,
            True,
            CAUSAL,
            WINDOWED,
            SOFTCAP,
        )
        weights = gl.convert_layout(rounded(donor, v_smem.dtype), P_LAYOUT, assert_trivial=True)
        for i in range(1, masked):
            acc, weights, donor, peak, total = _step(
                q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, acc, weights, donor, peak, total, n + i,
                (last - i) * WALK, keys, positions, factor, inner, window, True, CAUSAL, WINDOWED, SOFTCAP, P_LAYOUT,
            )  # fmt: skip
        if not WINDOWED:
            for i in range(masked, blocks):
                acc, weights, donor, peak, total = _step(
                    q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, acc, weights, donor, peak, total, n + i,
                    (last - i) * WALK, keys, positions, factor, inner, window, False, CAUSAL, WINDOWED, SOFTCAP,
                    P_LAYOUT,
                )  # fmt: skip
        n += blocks
        mbarrier.arrive(q_empty.index(slot), count=1)
        final = (n - 1) % STAGES
        mbarrier.wait(v_ready.index(final), (n - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_smem.index(final).reshape((WALK, DIM)), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(v_empty.index(final), count=1)

        empty = total == 0.0
        total = gl.where(empty, 1.0, total)
        logarithm = gl.where(empty, float("-inf"), (peak * factor + gl.log2(total)) * 0.6931471805599453)
        gl.store(lse + head.to(gl.int64) * tokens + start + rows, logarithm, rows < length)
        total = gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
        store_rows(
            acc * gl.expand_dims(1.0 / total, 1), o_smem.index(GROUP).reshape((ROWS, DIM)), out, start, first_row,
            length, head, heads, HEAD_DIM,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["window", "num_seqs", "tokens", "heads", "group", "tiles", "each"])
def forward_kernel(
    q_desc, k_desc, v_desc, out, lse, cu_q, cu_k, factor, inner, window, num_seqs, tokens, heads, group, tiles, each,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, WALK: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, STAGED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Items are tiles of GROUPS · ROWS queries of a head. Grid: (programs), as many as items or fewer; as many, unless
    STAGED."""
    turns = share_of(tiles * heads)
    TILES: gl.constexpr = 2 if STAGED else 1  # whose queries are here at a time
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [TILES * GROUPS, ROWS, 1, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, WALK, 1, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, WALK, 1, DIM], v_desc.layout)
    if STAGED:  # noqa: SIM108 - the condition is the compiler's
        o_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, 1, DIM], q_desc.layout)
    else:
        o_smem = q_smem
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
                q_smem, k_smem, v_smem, o_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out, lse, cu_q,
                cu_k, factor, inner, window, num_seqs, tokens, heads, tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, o_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out, lse, cu_q,
                cu_k, factor, inner, window, num_seqs, tokens, heads, tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                q_smem, k_smem, v_smem, o_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out, lse, cu_q,
                cu_k, factor, inner, window, num_seqs, tokens, heads, tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, o_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out, lse, cu_q,
                cu_k, factor, inner, window, num_seqs, tokens, heads, tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 1,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, o_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out, lse, cu_q,
                cu_k, factor, inner, window, num_seqs, tokens, heads, tiles, each, turns, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                cu_q, cu_k, window, num_seqs, group, tiles, each, turns, CAUSAL, WINDOWED, GROUPS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
