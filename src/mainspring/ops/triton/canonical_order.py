"""The canonical order of attention's sums in Triton: its constants and its formulas (docs/design.md).

The keys of a row are reduced in chunks of KEY_CHUNK aligned at position 0. Within a chunk an online softmax walks
over blocks of keys (their size is a function of the head size and dtype); chunks are merged left to right. A fully
masked block leaves a row's state as it was, so that it does not matter which rows share a tile. What the weights of
a chunk are relative to follows its largest score at a distance (at most MAX_GROWTH), so that sums are hardly ever
rescaled. csrc/cuda/canonical.cuh has the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

KEY_CHUNK = 1024
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


def tile_of(head_dim: int, dtype: torch.dtype, split: bool = False) -> Tile:
    """The tile for a head size. The keys are those of csrc/cuda/canonical.cuh, as its kernels on Hopper like them."""
    if dtype == torch.float32:
        return Tile(32, 32, 4 if head_dim <= 64 else 8, 1)
    if head_dim <= 128:
        wide = head_dim > 64
        return Tile(128 if wide and not split else 64, 128, 8 if wide else 4, 2)
    return Tile(64, 64, 8, 2)


@triton.jit
def lane_sums(weights, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """[ROWS, KEYS] -> [ROWS, 8]: lane r has the columns 8 i + r, summed by a binary tree of neighbours. A thread holds
    whole lanes of a tensor core's product, and a sum of two is the same however Triton lays it out."""
    lanes = tl.reshape(weights, (ROWS, KEYS // 8, 8))
    for i in tl.static_range(5):
        if 1 << i < KEYS // 8:
            lanes = tl.sum(tl.reshape(lanes, (ROWS, KEYS // (16 << i), 2, 8)), 2)
    return tl.reshape(lanes, (ROWS, 8))


@triton.jit
def whole_sum(lanes, ROWS: tl.constexpr):
    """[ROWS, 8] -> [ROWS], by a binary tree of neighbours."""
    pairs = tl.sum(tl.reshape(lanes, (ROWS, 4, 2)), 2)
    return tl.sum(tl.sum(tl.reshape(pairs, (ROWS, 2, 2)), 2), 1)


@triton.jit
def block(
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
    total = tl.fma(total, shrink[:, None], lane_sums(weights, ROWS, KEYS))
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def merge_scalars(peak, chunk_peak, scale):
    """(new peak, factor of what was summed before, factor of the chunk)."""
    new_peak = tl.maximum(peak, chunk_peak)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, tl.exp2((peak - safe) * scale), tl.exp2((chunk_peak - safe) * scale)


@triton.jit
def log_sum(peak, total, scale):
    """The natural logarithm of the sum of the exponentials."""
    return tl.fma(peak, scale, tl.log2(total)) * LN_2


@triton.jit
def merge(out, peak, total, acc, chunk_peak, chunk_total, scale):
    """A chunk's state into the row's. out, acc: [rows, D]; the others [rows]."""
    new_peak, before, now = merge_scalars(peak, chunk_peak, scale)
    total = tl.fma(total, before, chunk_total * now)
    out = tl.fma(out, before[:, None], acc * now[:, None])
    return out, new_peak, total
