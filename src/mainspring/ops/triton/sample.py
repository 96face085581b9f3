"""`ops.sample` on the GPU: the floor of each row that truncates, then one pass over the logits, spread over the GPU.

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
    MASS_UNIT,
    ROW_WORDS,
    SMALL_UNIFORM,
    SMALLEST_TEMPERATURE,
    SamplingTensors,
)
from mainspring.ops.triton.support import multiprocessors, on_device, require

TILE = 2048  # logits that a program looks at at a time
WARPS = 4
_SEGMENT_TILES = 4  # of a program, unless rows are many
_PROGRAMS_EACH = 8  # a multiprocessor: with more rows than that a program takes longer segments
_FLOOR_TILE = 1024
_FLOOR_WARPS = 16
_PIVOTS = 8  # of a round of the floor's search, a power of two
_CANDIDATES = 1024  # logits among which the floor is looked for first

# Triton reads globals of a kernel only if they are constants of its own kind.
_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_LARGEST_UNIFORM: tl.constexpr = tl.constexpr(LARGEST_UNIFORM)
_SMALL_UNIFORM: tl.constexpr = tl.constexpr(SMALL_UNIFORM)
_SMALLEST_TEMPERATURE: tl.constexpr = tl.constexpr(SMALLEST_TEMPERATURE)
_MASS_UNIT: tl.constexpr = tl.constexpr(MASS_UNIT)
_WORDS: tl.constexpr = tl.constexpr(ROW_WORDS)


@triton.jit
def mix(value):
    """The finaliser of SplitMix64, on uint64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def gumbel(half):
    """Noise from 32 random bits: see `ops.sample.token_noise`."""
    w = half.to(tl.uint32).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    w = tl.minimum(w, _LARGEST_UNIFORM)
    series = w * (1.0 + w * (0.5 + w * 0.3333333333333333))
    return -tl.log(tl.where(w < _SMALL_UNIFORM, series, -tl.log(1.0 - w)))


@triton.jit(do_not_specialize=["stride", "tiles"])
def score_kernel(
    logits, floors, rows_of_seats, seats, positions, best, best_token, stride, tiles,
    V: tl.constexpr, TILE: tl.constexpr, TRUNCATE: tl.constexpr,
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
    for tile in range(first, min(first + tiles, tl.cdiv(V, TILE))):
        index = tile * TILE + offset
        score = tl.load(logits + row * stride + index, index < V, float("-inf"))
        if TRUNCATE:
            score = tl.where(score >= floor, score, float("-inf"))
        if temperature > 0:
            pair = tile * (TILE // 2) + tl.arange(0, TILE // 2) + 1
            word = mix(base + pair.to(tl.uint64) * _GOLDEN)
            score += temperature * tl.interleave(gumbel(word), gumbel(word >> 32))
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


@triton.jit
def order_of(value):
    """An integer that is ordered as the floats are."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(order):
    """The float of an order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(value, peak, temperature):
    return (tl.exp((value - peak) / temperature) * _MASS_UNIT).to(tl.int64)


@triton.jit
def mass_from(values, count, lowest, peak, temperature, TILE: tl.constexpr):
    """The mass of those of `count` values that are at least `lowest`."""
    total = tl.zeros((TILE,), tl.int64)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        value = tl.load(values + index, index < count, float("-inf"))
        total += tl.where(value >= lowest, mass_of(value, peak, temperature), 0)
    return tl.sum(total, 0)


@triton.jit
def largest_floor(
    values, count, wanted, low, lowest, peak, temperature, BY_MASS: tl.constexpr, TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """The largest floor over which enough of `count` values is: `wanted` of them, or that much of the mass of those of
    at least `lowest`. Over the value with the order `low` is enough.

    A round counts over PIVOTS floors between `low`, over which enough is, and `high`, over which it is not; the search
    ends where one value at most lies between.
    """
    low = low.to(tl.int64)
    high = order_of(peak).to(tl.int64) + 1
    between = count.to(tl.int64)
    above_high = tl.zeros((), tl.int64)
    steps = tl.arange(0, PIVOTS) + 1
    while (high - low > 1) & (between > 1):
        pivots = tl.minimum(low + (high - low + PIVOTS) // (PIVOTS + 1) * steps, high).to(tl.int32)
        over = tl.zeros((TILE, PIVOTS), tl.int32)
        mass = tl.zeros((TILE, PIVOTS), tl.int64)
        for start in range(0, count, TILE):
            index = start + tl.arange(0, TILE)
            value = tl.load(values + index, index < count, float("-inf"))
            is_over = (order_of(value)[:, None] >= pivots[None, :]) & (index < count)[:, None]
            over += is_over.to(tl.int32)
            if BY_MASS:
                weight = tl.where(value >= lowest, mass_of(value, peak, temperature), 0)
                mass += tl.where(is_over, weight[:, None], 0)
        counts = tl.sum(over, 0).to(tl.int64)  # [PIVOTS], falling
        amounts = tl.sum(mass, 0) if BY_MASS else counts
        enough = amounts >= wanted
        # Of the floors with enough the highest, of those without the lowest.
        above_low = tl.min(tl.where(enough, counts, above_high + between), 0)
        above_high = tl.max(tl.where(enough, above_high, counts), 0)
        low = tl.max(tl.where(enough, pivots.to(tl.int64), low), 0)
        high = tl.min(tl.where(enough, high, pivots.to(tl.int64)), 0)
        between = above_low - above_high
    return value_of(low.to(tl.int32))


@triton.jit
def floor_among(
    values, count, low, floor, top_k, limited, top_p, whole, peak, temperature, TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """What top-k and then top-p leave of `count` values, of which those under `floor` have gone already.

    whole: the mass that top-p is a share of, where top-k does not limit. Values under the order `low` do not matter.
    """
    if limited:
        kth = largest_floor(
            values, count, top_k.to(tl.int64), low, floor, peak, temperature, False, TILE, PIVOTS
        )
        floor = tl.maximum(floor, kth)
        whole = mass_from(values, count, floor, peak, temperature, TILE)
    if top_p < 1:
        wanted = tl.maximum((top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
        low = tl.maximum(low, order_of(floor))
        by_mass = largest_floor(values, count, wanted, low, floor, peak, temperature, True, TILE, PIVOTS)
        floor = tl.maximum(floor, by_mass)
    return floor


@triton.jit(do_not_specialize=["stride"])
def floor_kernel(
    logits, rows_of_seats, seats, floors, candidates, counters, stride,
    V: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """floors: [rows], what min-p, top-k and top-p leave. Grid: (rows,).

    Three passes over the row find its peak, how many logits lie over some levels below it, and those over the lowest
    level that has few enough (candidates: [rows, CANDIDATES]). The search is made among these; only where the floor
    lies below them (a flat distribution) among all.
    """
    row = tl.program_id(0).to(tl.int64)
    words = rows_of_seats + tl.load(seats + row) * _WORDS
    fields = words.to(tl.pointer_type(tl.float32))
    given = tl.load(fields + 2)
    top_p = tl.load(fields + 3)
    min_p = tl.load(fields + 4)
    top_k = tl.load(words.to(tl.pointer_type(tl.int32)) + 5)
    temperature = tl.maximum(given, _SMALLEST_TEMPERATURE)
    limited = (top_k > 0) & (top_k < V)
    floor = tl.full((), float("-inf"), tl.float32)
    if (given > 0) & (limited | (top_p < 1) | (min_p > 0)):
        row_logits = logits + row * stride
        top = tl.full((TILE,), float("-inf"), tl.float32)
        for start in range(0, V, TILE):
            index = start + tl.arange(0, TILE)
            top = tl.maximum(top, tl.load(row_logits + index, index < V, float("-inf")))
        peak = tl.max(top, 0)
        if peak > float("-inf"):
            floor = tl.where(min_p > 0, peak + temperature * tl.log(min_p), floor)
            if limited | (top_p < 1):
                # From half a unit of the temperature below the peak to 19 of them.
                step = tl.exp2(tl.arange(0, PIVOTS).to(tl.float32) * 0.75) * 0.5
                levels = tl.maximum(peak - temperature * step, floor)
                over = tl.zeros((TILE, PIVOTS), tl.int32)
                total = tl.zeros((TILE,), tl.int64)
                for start in range(0, V, TILE):
                    index = start + tl.arange(0, TILE)
                    value = tl.load(row_logits + index, index < V, float("-inf"))
                    over += (value[:, None] >= levels[None, :]).to(tl.int32)
                    total += tl.where(value >= floor, mass_of(value, peak, temperature), 0)
                whole = tl.sum(total, 0)
                counts = tl.sum(over, 0)
                level = tl.min(tl.where(counts <= CANDIDATES, levels, float("inf")), 0)
                count = tl.max(tl.where(counts <= CANDIDATES, counts, 0), 0)
                own = candidates + row * CANDIDATES
                tl.store(counters + row, 0)
                tl.debug_barrier()
                for start in range(0, V, TILE):
                    index = start + tl.arange(0, TILE)
                    value = tl.load(row_logits + index, index < V, float("-inf"))
                    chosen = (value >= level) & (index < V)
                    place = tl.atomic_add(counters + row + tl.zeros((TILE,), tl.int32), 1, chosen)
                    tl.store(own + place, value, chosen)
                tl.debug_barrier()
                wanted = tl.maximum((top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
                held = mass_from(own, count, floor, peak, temperature, TILE)
                are_enough = (count > 0) & tl.where(limited, count >= top_k, held >= wanted)
                if are_enough:
                    floor = floor_among(
                        own, count, order_of(level), floor, top_k, limited, top_p, whole, peak, temperature, TILE,
                        PIVOTS,
                    )  # fmt: skip
                else:
                    nothing = order_of(tl.full((), float("-inf"), tl.float32))
                    everything = tl.full((), V, tl.int32)
                    floor = floor_among(
                        row_logits, everything, nothing, floor, top_k, limited, top_p, whole, peak, temperature,
                        TILE, PIVOTS,
                    )  # fmt: skip
    tl.store(floors + row, floor)


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
            V=v, TILE=TILE, TRUNCATE=truncate, num_warps=WARPS,
        )  # fmt: skip
        choose_kernel[(rows,)](
            best, best_token, tokens, segments, V=v, SEGMENTS=triton.next_power_of_2(segments), num_warps=1
        )
    return tokens


def floors(logits: Tensor, params: SamplingTensors, seats: Tensor) -> Tensor:
    """See `ops.sample.floors`. logits: [N, V] float32 -> [N] float32."""
    rows, v = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    candidates = torch.empty((rows, _CANDIDATES), dtype=torch.float32, device=logits.device)
    counters = torch.empty(rows, dtype=torch.int32, device=logits.device)
    with on_device(logits):
        floor_kernel[(rows,)](
            logits, params.rows, seats, found, candidates, counters, logits.stride(0), V=v, TILE=_FLOOR_TILE,
            PIVOTS=_PIVOTS, CANDIDATES=_CANDIDATES, num_warps=_FLOOR_WARPS,
        )  # fmt: skip
    return found


def segmentation(rows: int, vocab_size: int, processors: int) -> tuple[int, int]:
    """(tiles of a segment, segments of a row): about _PROGRAMS_EACH programs a multiprocessor, or fewer."""
    tiles = triton.cdiv(vocab_size, TILE)
    each = max(_SEGMENT_TILES, triton.cdiv(rows * tiles, processors * _PROGRAMS_EACH))
    each = min(each, tiles)
    return each, triton.cdiv(tiles, each)
