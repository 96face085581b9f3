"""Flash attention forward for Hopper in Gluon: a warp that loads by TMA, warpgroups that compute.

Each computing warpgroup has rows of its own. It starts the product that gives the next block's scores, then that of
this block's values, and computes the next softmax while the latter runs (Shah et al. 2024, "FlashAttention-3",
section 3.2). Blocks of keys are walked from the last to the first, so that the masked ones come first and the long
loop needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mainspring.ops.triton.support import aligned

# Renamed after Triton 3.6.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@dataclass(frozen=True)
class HopperTile:
    """Rows of a computing warpgroup, keys of a block, computing warpgroups, blocks in flight, and the registers of a
    computing thread."""

    rows: int
    keys: int
    groups: int
    stages: int
    registers: int = 240


FORWARD_TILES = {
    64: HopperTile(64, 128, 3, 2, 160),
    128: HopperTile(64, 128, 2, 2),
    256: HopperTile(64, 64, 2, 2),
}


def serves(head_dim: int, *tensors: Tensor) -> bool:
    """Whether the Hopper kernels take such tensors [T, H, D]: they need warpgroup products and tensor descriptors."""
    x = tensors[0]
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and head_dim in FORWARD_TILES
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and all(aligned(t) and t.numel() > 0 for t in tensors)
    )


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of `rows` tokens of one head of a packed [T, H, D], whose rows are H · D wide here."""
    tokens, heads, d = x.shape
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(x, [tokens, heads * d], [x.stride(0), 1], [rows, d], layout)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *, factor: float,
    inner: float, causal: bool, window: int, tile: HopperTile | None = None,
) -> None:  # fmt: skip
    """Fills out and lse. Arguments as those of `flash_attention_forward`, checked, with `serves` true; scores are
    factor · q·k in powers of two, or with inner > 0 factor · tanh(inner · q·k)."""
    tokens, heads, d = q.shape
    tile = tile or FORWARD_TILES[d]
    num_seqs = cu_q.shape[0] - 1
    forward_kernel[(tokens // (tile.rows * tile.groups) + num_seqs, heads)](
        rows_of(q, tile.rows), rows_of(k, tile.keys), rows_of(v, tile.keys), out, lse, cu_q, cu_k, factor, inner,
        window, num_seqs, tokens, heads // k.shape[1], HEAD_DIM=d, DIM=d, ROWS=tile.rows, KEYS=tile.keys,
        GROUPS=tile.groups, STAGES=tile.stages, CAUSAL=causal, WINDOWED=window > 0, SOFTCAP=inner > 0,
        REGISTERS=tile.registers, num_warps=4,
    )  # fmt: skip


@gluon.jit
def sequence_of(cu, num_seqs, tile, ROWS: gl.constexpr):
    """The sequence that owns a tile: sequence s owns tiles from floor(cu[s] / ROWS) + s on."""
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if gl.load(cu + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@gluon.jit
def tanh(x):
    """By one exponential and one division: exact to the last bits of 1 for any finite x."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(x * 2.885390081777927))


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x in bfloat16 or float16, two values an instruction, which the compiler does not find by itself."""
    if dtype == gl.bfloat16:
        result = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        result = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return result


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, q_row, k_row, head,
    kv_head, last, blocks, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Loads the tile's queries, then blocks of keys and values from block `last` down."""
    GROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    for g in gl.static_range(GROUPS):
        mbarrier.expect(q_ready.index(g), q_desc.block_type.nbytes)
        tma_load(q_desc, [q_row + g * q_smem.shape[1], head * HEAD_DIM], q_ready.index(g), q_smem.index(g))
    for i in range(blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        row = k_row + (last - i) * KEYS
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        tma_load(k_desc, [row, kv_head * HEAD_DIM], k_ready.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        tma_load(v_desc, [row, kv_head * HEAD_DIM], v_ready.index(stage), v_smem.index(stage))


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
    q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, acc, weights, donor, peak, total, i, last, keys, positions,
    factor, inner, window, MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of block i beside the product of block i - 1's weights and values.

    donor: registers for the scores that hold nothing of worth any more.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), (i // STAGES) & 1)
    scores = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), donor, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
    product = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    donor, peak, total, shrink = _softmax(
        scores,
        peak,
        total,
        (last - i) * KEYS,
        keys,
        positions,
        factor,
        inner,
        window,
        MASKED,
        CAUSAL,
        WINDOWED,
        SOFTCAP,
    )
    acc, weights = warpgroup_mma_wait(0, deps=[product, weights])
    mbarrier.arrive(v_empty.index(before), count=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    acc = acc * gl.expand_dims(shrink, 1)
    weights = gl.convert_layout(rounded(donor, v_smem.dtype), P_LAYOUT, assert_trivial=True)
    return acc, weights, donor, peak, total


@gluon.jit
def _consume(
    q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, out, lse, start, row0, length, keys, head,
    heads, tokens, last, masked, blocks, factor, inner, window, HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its rows against every block."""
    ROWS: gl.constexpr = q_smem.shape[1]
    DIM: gl.constexpr = q_smem.shape[2]
    KEYS: gl.constexpr = k_smem.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first_row = row0 + GROUP * ROWS
    positions = keys - length + first_row + gl.arange(0, ROWS, ROW_LAYOUT)
    peak = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, ROW_LAYOUT)
    acc = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
    donor = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    q = q_smem.index(GROUP)
    mbarrier.wait(q_ready.index(GROUP), 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), donor, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    donor, peak, total, _ = _softmax(
        scores,
        peak,
        total,
        last * KEYS,
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
            q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, acc, weights, donor, peak, total, i, last, keys,
            positions, factor, inner, window, True, CAUSAL, WINDOWED, SOFTCAP, P_LAYOUT,
        )  # fmt: skip
    if not WINDOWED:
        for i in range(masked, blocks):
            acc, weights, donor, peak, total = _step(
                q, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, acc, weights, donor, peak, total, i, last, keys,
                positions, factor, inner, window, False, CAUSAL, WINDOWED, SOFTCAP, P_LAYOUT,
            )  # fmt: skip
    STAGES: gl.constexpr = k_smem.shape[0]
    final = blocks - 1
    mbarrier.wait(v_ready.index(final % STAGES), (final // STAGES) & 1)
    acc = warpgroup_mma(weights, v_smem.index(final % STAGES), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])

    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    rows = first_row + gl.arange(0, ROWS, ROW_LAYOUT)
    logarithm = gl.where(empty, float("-inf"), (peak * factor + gl.log2(total)) * 0.6931471805599453)
    gl.store(lse + head.to(gl.int64) * tokens + start + rows, logarithm, rows < length)
    total = gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
    result = rounded(acc * gl.expand_dims(1.0 / total, 1), out.dtype.element_ty)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    # Through the shared memory of the queries, which are no longer needed: 16 bytes a store.
    q.store(result)
    result = q.load(STORE)
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, STORE))
    offsets = gl.expand_dims(((start + rows).to(gl.int64) * heads + head) * HEAD_DIM, 1) + gl.expand_dims(
        dims, 0
    )
    inside = gl.expand_dims(rows < length, 1) & gl.expand_dims(dims < HEAD_DIM, 0)
    gl.store(out + offsets, result, inside)


@gluon.jit(do_not_specialize=["num_seqs", "tokens", "window", "group"])
def forward_kernel(
    q_desc, k_desc, v_desc, out, lse, cu_q, cu_k, factor, inner, window, num_seqs, tokens, group,
    HEAD_DIM: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: (tiles of GROUPS · ROWS queries, query heads)."""
    TILE: gl.constexpr = GROUPS * ROWS
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # under a causal mask the longest first
    head = gl.program_id(1)
    heads = gl.num_programs(1)
    s = sequence_of(cu_q, num_seqs, tile, TILE)
    start = gl.load(cu_q + s)
    length = gl.load(cu_q + s + 1) - start
    row0 = (tile - (start // TILE + s)) * TILE
    k_start = gl.load(cu_k + s)
    keys = gl.load(cu_k + s + 1) - k_start
    lead = keys - length  # position of the first query
    low = 0
    high = keys
    full = keys // KEYS  # blocks before it are seen whole
    if CAUSAL:
        high = gl.minimum(keys, lead + gl.minimum(row0 + TILE, length))
        full = gl.minimum(full, gl.maximum(lead + row0 + 1, 0) // KEYS)
    if WINDOWED:
        low = gl.maximum(lead + row0 + 1 - window, 0) // KEYS
    last = gl.maximum((high + KEYS - 1) // KEYS, low + 1) - 1
    if row0 >= length:
        last = low
    blocks = last + 1 - low  # at least one, though it be masked whole
    masked = gl.minimum(gl.maximum(last + 1 - full, 1), blocks)
    if WINDOWED:
        masked = blocks

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, DIM], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(GROUPS):
        mbarrier.init(q_ready.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (
                q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, out, lse, start, row0, length,
                keys, head, heads, tokens, last, masked, blocks, factor, inner, window, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, out, lse, start, row0, length,
                keys, head, heads, tokens, last, masked, blocks, factor, inner, window, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty,
                start + row0, k_start, head, head // group, last, blocks, HEAD_DIM,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, out, lse, start, row0, length,
                keys, head, heads, tokens, last, masked, blocks, factor, inner, window, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 0,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, out, lse, start, row0, length,
                keys, head, heads, tokens, last, masked, blocks, factor, inner, window, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 1,
            )),
            (_consume, (
                q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty, out, lse, start, row0, length,
                keys, head, heads, tokens, last, masked, blocks, factor, inner, window, HEAD_DIM, CAUSAL, WINDOWED,
                SOFTCAP, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_empty, v_ready, v_empty,
                start + row0, k_start, head, head // group, last, blocks, HEAD_DIM,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
