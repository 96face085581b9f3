"""`ops.sample` on the GPU: one pass over the logits, spread over the GPU, after the floors of rows that truncate.

The pass takes the best score of each segment of a row, and a second launch the best of the segments. A maximum has no
rounding and ties go to the lowest token, so it does not matter how a row is cut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.sampling_tensors import (
    GOLDEN,
    LARGEST_UNIFORM,
    ROW_WORDS,
    SMALL_UNIFORM,
    SamplingTensors,
)
from mainspring.ops.triton.sample_floors import floors
from mainspring.ops.triton.support import interpreted, multiprocessors, on_device, require

TILE = 2048  # logits that a program looks at at a time
WARPS = 4
_SEGMENT_TILES = 4  # of a program, unless rows are many
_PROGRAMS_EACH = 8  # a multiprocessor: with more rows than that a program takes longer segments

# Triton reads globals of a kernel only if they are constants of its own kind.
_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_LARGEST_UNIFORM: tl.constexpr = tl.constexpr(LARGEST_UNIFORM)
_SMALL_UNIFORM: tl.constexpr = tl.constexpr(SMALL_UNIFORM)
_WORDS: tl.constexpr = tl.constexpr(ROW_WORDS)


@triton.jit
def mix(value):
    """The finaliser of SplitMix64, on uint64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def log(x, HARDWARE: tl.constexpr):
    """The natural logarithm of a normal number; by the hardware's unit with an error of 2^-22 (of 1, or relative).

    Ten times fewer instructions than the exact one, of which a token's noise takes two; the noise is random anyway.
    """
    if HARDWARE:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log(x)


@triton.jit
def gumbel(half, HARDWARE: tl.constexpr):
    """Noise from 32 random bits: see `ops.sample.token_noise`."""
    w = half.to(tl.uint32).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    w = tl.minimum(w, _LARGEST_UNIFORM)
    series = w * (1.0 + w * (0.5 + w * 0.3333333333333333))
    return -log(tl.where(w < _SMALL_UNIFORM, series, -log(1.0 - w, HARDWARE)), HARDWARE)


@triton.jit(do_not_specialize=["stride", "tiles"])
def score_kernel(
    logits, floors, rows_of_seats, seats, positions, best, best_token, stride, tiles,
    V: tl.constexpr, TILE: tl.constexpr, TRUNCATE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """best, best_token: [rows, segments]; a segment is `tiles` tiles. Grid: (rows, segments)."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    words = rows_of_seats + tl.load(seats + row) * _WORDS
    temperature = tl.load((words + 1).to(tl.pointer_type(tl.float32)))
    position = tl.load(positions + row)
    key = tl.load(words).to(tl.uint64, bitcast=True)
    base = mix(key + (position + 1).to(tl.uint64) * _GOLDEN)
    floor = float("-inf")
    if TRUNCATE:
        floor = tl.load(floors + row)
    offset = tl.arange(0, TILE)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    top_tile = tl.zeros((TILE,), tl.int32)
    first = segment * tiles
    steps = (tl.arange(0, TILE // 2) + 1).to(tl.uint64) * _GOLDEN
    for tile in range(first, min(first + tiles, tl.cdiv(V, TILE))):
        index = tile * TILE + offset
        score = tl.load(logits + row * stride + index, index < V, float("-inf"))
        if TRUNCATE:
            score = tl.where(score >= floor, score, float("-inf"))
        if temperature > 0:
            first_pair = (tl.zeros((), tl.int32) + tile * (TILE // 2)).to(tl.uint64)
            word = mix(base + first_pair * _GOLDEN + steps)
            score += temperature * tl.interleave(gumbel(word, HARDWARE), gumbel(word >> 32, HARDWARE))
        better = score > top
        top = tl.where(better, score, top)
        top_tile = tl.where(better, tile, top_tile)
    highest = tl.max(top, 0)
    token = tl.min(tl.where(top == highest, top_tile * TILE + offset, V), 0)
    place = row * tl.num_programs(1) + segment
    tl.store(best + place, highest)
    tl.store(best_token + place, token)


@triton.jit(do_not_specialize=["segments"])
def choose_kernel(best, best_token, tokens, segments, V: tl.constexpr, SEGMENTS: tl.constexpr):
    """The best of each row's segments. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    inside = segment < segments
    score = tl.load(best + row * segments + segment, inside, float("-inf"))
    token = tl.load(best_token + row * segments + segment, inside, V)
    highest = tl.max(score, 0)
    chosen = tl.min(tl.where(score == highest, token, V), 0)
    tl.store(tokens + row, chosen.to(tl.int64))


def sample(
    logits: Tensor, params: SamplingTensors, seats: Tensor, positions: Tensor, truncate: bool
) -> Tensor:
    """See `ops.sample.sample`.

    Raises:
        BackendError: logits whose rows are not contiguous.
    """
    rows, v = logits.shape
    require("sample", logits.stride(1) == 1 or v == 1, "the last dimension of logits must be contiguous")
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    found = floors(logits, params, seats) if truncate else logits
    tiles, segments = segmentation(rows, v, multiprocessors(logits.device))
    best = torch.empty((rows, segments), dtype=torch.float32, device=logits.device)
    best_token = torch.empty((rows, segments), dtype=torch.int32, device=logits.device)
    with on_device(logits):
        score_kernel[(rows, segments)](
            logits, found, params.rows, seats, positions, best, best_token, logits.stride(0), tiles,
            V=v, TILE=TILE, TRUNCATE=truncate, HARDWARE=not interpreted(), num_warps=WARPS,
        )  # fmt: skip
        choose_kernel[(rows,)](
            best, best_token, tokens, segments, V=v, SEGMENTS=triton.next_power_of_2(segments), num_warps=1
        )
    return tokens


def segmentation(rows: int, vocab_size: int, processors: int) -> tuple[int, int]:
    """(tiles of a segment, segments of a row): about _PROGRAMS_EACH programs a multiprocessor, or fewer."""
    tiles = triton.cdiv(vocab_size, TILE)
    each = max(_SEGMENT_TILES, triton.cdiv(rows * tiles, processors * _PROGRAMS_EACH))
    each = min(each, tiles)
    return each, triton.cdiv(tiles, each)
