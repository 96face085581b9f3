"""The floors of `ops.sample` on the GPU: what min-p, top-k and top-p leave of each row, without sorting it.

Passes that are spread over the GPU find a row's peak and spread, how many logits lie over eight levels in its upper
tail (and the mass of all), and gather those over a level that has enough and not too many: the candidates. One program
a row then searches among them for the floor. Only where it lies below them all (a flat distribution under top-p) does
it search the whole row. Levels decide how long that takes and never what is found. Counts and masses are integers,
whose sums have no order. Rows that do not truncate are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.sampling_tensors import MASS_UNIT, ROW_WORDS, SMALLEST_TEMPERATURE, SamplingTensors
from mainspring.ops.triton.support import multiprocessors, on_device

TILE = 1024  # logits that a program looks at at a time
WARPS = 8
LEVELS = 8  # bytes of a 64-bit word
CANDIDATES = 8192
PIVOTS = 8  # of a round of the search
_MOST_TILES = 255  # of a segment: a lane counts its tiles in a byte
_PROGRAMS_EACH = 8  # a multiprocessor

# Triton reads globals of a kernel only if they are constants of its own kind.
_SMALLEST_TEMPERATURE: tl.constexpr = tl.constexpr(SMALLEST_TEMPERATURE)
_MASS_UNIT: tl.constexpr = tl.constexpr(MASS_UNIT)
_WORDS: tl.constexpr = tl.constexpr(ROW_WORDS)


@triton.jit
def truncation(rows_of_seats, seats, row, V: tl.constexpr):
    """(whether the row truncates, whether it needs a search, temperature, top_k, whether that limits, top_p, min_p)."""
    words = rows_of_seats + tl.load(seats + row) * _WORDS
    fields = words.to(tl.pointer_type(tl.float32))
    temperature = tl.load(fields + 2)
    top_p = tl.load(fields + 3)
    min_p = tl.load(fields + 4)
    top_k = tl.load(words.to(tl.pointer_type(tl.int32)) + 5)
    limits = (top_k > 0) & (top_k < V)
    searches = (temperature > 0) & (limits | (top_p < 1))
    truncates = searches | ((temperature > 0) & (min_p > 0))
    return truncates, searches, tl.maximum(temperature, _SMALLEST_TEMPERATURE), top_k, limits, top_p, min_p


@triton.jit
def summary_of(summaries, row):
    """(peak, highest level, distance of the levels, number of finite logits) of the row."""
    own = summaries + row * 4
    return tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)


@triton.jit
def level_of(number, highest, distance):
    """Level `number`, the same bits for a scalar and for a vector of numbers: the fused product is named."""
    return tl.fma(-number.to(tl.float32), distance, highest)


@triton.jit
def min_p_floor(peak, temperature, min_p):
    return tl.where(min_p > 0, peak + temperature * tl.log(min_p), float("-inf"))


@triton.jit
def mass_of(value, peak, temperature):
    return (tl.exp((value - peak) / temperature) * _MASS_UNIT).to(tl.int64)


@triton.jit(do_not_specialize=["stride", "tiles"])
def moment_kernel(
    logits, rows_of_seats, seats, moments, counters, stride, tiles, V: tl.constexpr, TILE: tl.constexpr
):
    """moments: [rows, segments, 4], peak, number, sum and sum of squares of the finite logits; counters: [rows], set
    to 0. Grid: (rows, segments of `tiles` tiles)."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    truncates, _, _, _, _, _, _ = truncation(rows_of_seats, seats, row, V)
    if truncates:
        top = tl.full((TILE,), float("-inf"), tl.float32)
        number = tl.zeros((TILE,), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        squares = tl.zeros((TILE,), tl.float32)
        for tile in range(segment * tiles, min((segment + 1) * tiles, tl.cdiv(V, TILE))):
            index = tile * TILE + tl.arange(0, TILE)
            value = tl.load(logits + row * stride + index, index < V, float("-inf"))
            top = tl.maximum(top, value)
            finite = tl.where(value > float("-inf"), value, 0.0)
            number += (value > float("-inf")).to(tl.float32)
            total += finite
            squares += finite * finite
        own = moments + (row * tl.num_programs(1) + segment) * 4
        tl.store(own, tl.max(top, 0))
        tl.store(own + 1, tl.sum(number, 0))
        tl.store(own + 2, tl.sum(total, 0))
        tl.store(own + 3, tl.sum(squares, 0))
        if segment == 0:
            tl.store(counters + row, 0)


@triton.jit(do_not_specialize=["segments"])
def summary_kernel(
    rows_of_seats, seats, moments, summaries, segments,
    V: tl.constexpr, SEGMENTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """summaries: [rows, 4], see `summary_of`. Grid: (rows,).

    Levels lie 5.5, 5, ... 2 standard deviations above the mean: of 150,000 normal values 0 to 3,500 lie over them, of
    a language model's more. Where finite logits are few, all are candidates.
    """
    row = tl.program_id(0).to(tl.int64)
    truncates, _, _, _, _, _, _ = truncation(rows_of_seats, seats, row, V)
    if truncates:
        segment = tl.arange(0, SEGMENTS)
        place = moments + (row * segments + segment) * 4
        inside = segment < segments
        peak = tl.max(tl.load(place, inside, float("-inf")), 0)
        number = tl.sum(tl.load(place + 1, inside, 0.0), 0)
        mean = tl.sum(tl.load(place + 2, inside, 0.0), 0) / tl.maximum(number, 1.0)
        square = tl.sum(tl.load(place + 3, inside, 0.0), 0) / tl.maximum(number, 1.0)
        deviation = tl.sqrt(tl.maximum(square - mean * mean, 0.0))
        few = number <= CANDIDATES
        own = summaries + row * 4
        tl.store(own, peak)
        tl.store(own + 1, tl.where(few, -3.0e38, mean + 5.5 * deviation))
        tl.store(own + 2, tl.where(few, 0.0, 0.5 * deviation))
        tl.store(own + 3, number)


@triton.jit(do_not_specialize=["stride", "tiles"])
def level_kernel(
    logits, rows_of_seats, seats, summaries, counts, masses, stride, tiles,
    V: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """counts: [rows, segments, LEVELS] logits over each level; masses: [rows, segments] of those over min-p's floor."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    segments = tl.num_programs(1)
    _, searches, temperature, top_k, limits, top_p, min_p = truncation(rows_of_seats, seats, row, V)
    if searches:
        peak, highest, distance, number = summary_of(summaries, row)
        floor = min_p_floor(peak, temperature, min_p)
        weighs = (top_p < 1) & ((limits == 0) | (top_k >= number))
        # Of each lane, in byte j of a word, how many of its logits lie over level j and not over the one above it.
        lanes = tl.zeros((TILE,), tl.int64)
        total = tl.zeros((TILE,), tl.int64)
        for tile in range(segment * tiles, min((segment + 1) * tiles, tl.cdiv(V, TILE))):
            index = tile * TILE + tl.arange(0, TILE)
            value = tl.load(logits + row * stride + index, index < V, float("-inf"))
            below = tl.zeros((TILE,), tl.int32)
            for j in tl.static_range(LEVELS):
                below += (value < level_of(tl.full((), j, tl.int32), highest, distance)).to(tl.int32)
            is_over = (below < LEVELS) & (index < V)
            one = tl.full((TILE,), 1, tl.int64) << (8 * tl.where(is_over, below, 0)).to(tl.int64)
            lanes += tl.where(is_over, one, 0)
            if weighs:
                total += tl.where(value >= floor, mass_of(value, peak, temperature), 0)
        own = counts + (row * segments + segment) * LEVELS
        count = tl.zeros((), tl.int32)
        for j in tl.static_range(LEVELS):
            count += tl.sum(((lanes >> (8 * j)) & 255).to(tl.int32), 0)
            tl.store(own + j, count)
        tl.store(masses + row * segments + segment, tl.sum(total, 0))


@triton.jit
def chosen_level(
    counts, row, highest, distance, top_k, limits, segments, LEVELS: tl.constexpr, SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """(a level with at most CANDIDATES logits over it, their number): where top-k limits, the highest with as many as
    that keeps, else the lowest. (inf, 0) if there is none."""
    segment = tl.arange(0, SEGMENTS)[:, None]
    place = counts + (row * segments + segment) * LEVELS + tl.arange(0, LEVELS)[None, :]
    count = tl.sum(tl.load(place, segment < segments, 0), 0)
    levels = level_of(tl.arange(0, LEVELS), highest, distance)
    fits = (count <= CANDIDATES) & (count >= tl.where(limits, top_k, 1))
    upper = tl.max(tl.where(fits, levels, float("-inf")), 0)
    lower = tl.min(tl.where(fits, levels, float("inf")), 0)
    fewest = tl.min(tl.where(fits, count, CANDIDATES), 0)
    most = tl.max(tl.where(fits, count, 0), 0)
    level = tl.where(most > 0, tl.where(limits, upper, lower), float("inf"))
    return level, tl.where(most > 0, tl.where(limits, fewest, most), 0)


@triton.jit(do_not_specialize=["stride", "tiles"])
def gather_kernel(
    logits, rows_of_seats, seats, summaries, counts, candidates, counters, stride, tiles,
    V: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, SEGMENTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """candidates: [rows, CANDIDATES], the logits over the chosen level, in any order: only their sums are taken."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    segments = tl.num_programs(1)
    _, searches, _, top_k, limits, _, _ = truncation(rows_of_seats, seats, row, V)
    if searches:
        _, highest, distance, number = summary_of(summaries, row)
        level, _count = chosen_level(
            counts,
            row,
            highest,
            distance,
            top_k,
            limits & (top_k < number),
            segments,
            LEVELS,
            SEGMENTS,
            CANDIDATES,
        )
        for tile in range(segment * tiles, min((segment + 1) * tiles, tl.cdiv(V, TILE))):
            index = tile * TILE + tl.arange(0, TILE)
            value = tl.load(logits + row * stride + index, index < V, float("-inf"))
            chosen = (value >= level) & (index < V)
            place = tl.atomic_add(counters + row + tl.zeros((TILE,), tl.int32), 1, chosen)
            tl.store(candidates + row * CANDIDATES + place, value, chosen & (place < CANDIDATES))


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
    values, count, low, floor, top_k, limits, top_p, whole, peak, temperature, TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    """What top-k and then top-p leave of `count` values, of which those under `floor` have gone already.

    whole: the mass that top-p is a share of, where top-k does not limit. Values under the order `low` do not matter.
    """
    if limits:
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


@triton.jit(do_not_specialize=["stride", "segments"])
def search_kernel(
    logits, rows_of_seats, seats, summaries, counts, masses, candidates, floors, stride, segments,
    V: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr, LEVELS: tl.constexpr, SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """floors: [rows]. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    truncates, searches, temperature, top_k, limits, top_p, min_p = truncation(rows_of_seats, seats, row, V)
    floor = tl.full((), float("-inf"), tl.float32)
    if truncates:
        peak, highest, distance, number = summary_of(summaries, row)
        floor = min_p_floor(peak, temperature, min_p)
        limits = limits & (top_k < number)
        if searches & (peak > float("-inf")):
            level, count = chosen_level(
                counts, row, highest, distance, top_k, limits, segments, LEVELS, SEGMENTS, CANDIDATES
            )
            segment = tl.arange(0, SEGMENTS)
            whole = tl.sum(tl.load(masses + row * segments + segment, segment < segments, 0), 0)
            wanted = tl.maximum((top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
            own = candidates + row * CANDIDATES
            held = mass_from(own, count, floor, peak, temperature, TILE)
            if (count > 0) & (limits | (held >= wanted)):
                floor = floor_among(
                    own,
                    count,
                    order_of(level),
                    floor,
                    top_k,
                    limits,
                    top_p,
                    whole,
                    peak,
                    temperature,
                    TILE,
                    PIVOTS,
                )
            else:
                nothing = order_of(tl.full((), float("-inf"), tl.float32))
                everything = tl.full((), V, tl.int32)
                floor = floor_among(
                    logits + row * stride, everything, nothing, floor, top_k, limits, top_p, whole, peak,
                    temperature, TILE, PIVOTS,
                )  # fmt: skip
    tl.store(floors + row, floor)


def floors(logits: Tensor, params: SamplingTensors, seats: Tensor) -> Tensor:
    """See `ops.sample.floors`. logits: [N, V] float32 with contiguous rows, seats: [N] int64 -> [N] float32."""
    rows, v = logits.shape
    device, stride = logits.device, logits.stride(0)
    if v == 1:  # nothing to choose from, and a search over one value is what Triton 3.6 cannot compile
        return torch.full((rows,), -torch.inf, device=device)
    tiles = triton.cdiv(v, TILE)
    each = min(
        max(4, triton.cdiv(rows * tiles, multiprocessors(device) * _PROGRAMS_EACH)), tiles, _MOST_TILES
    )
    segments = triton.cdiv(tiles, each)
    found = torch.empty(rows, dtype=torch.float32, device=device)
    moments = torch.empty((rows, segments, 4), dtype=torch.float32, device=device)
    summaries = torch.empty((rows, 4), dtype=torch.float32, device=device)
    masses = torch.empty((rows, segments), dtype=torch.int64, device=device)
    counts = torch.empty((rows, segments, LEVELS), dtype=torch.int32, device=device)
    candidates = torch.empty((rows, CANDIDATES), dtype=torch.float32, device=device)
    counters = torch.empty(rows, dtype=torch.int32, device=device)
    cut = {"V": v, "TILE": TILE, "num_warps": WARPS}
    choice = {"LEVELS": LEVELS, "SEGMENTS": triton.next_power_of_2(segments), "CANDIDATES": CANDIDATES}
    who = (params.rows, seats)
    with on_device(logits):
        grid = (rows, segments)
        moment_kernel[grid](logits, *who, moments, counters, stride, each, **cut)
        summary_kernel[(rows,)](
            *who,
            moments,
            summaries,
            segments,
            V=v,
            SEGMENTS=choice["SEGMENTS"],
            CANDIDATES=CANDIDATES,
            num_warps=1,
        )
        level_kernel[grid](logits, *who, summaries, counts, masses, stride, each, LEVELS=LEVELS, **cut)
        gather_kernel[grid](
            logits, *who, summaries, counts, candidates, counters, stride, each, **cut, **choice
        )
        search_kernel[(rows,)](
            logits, *who, summaries, counts, masses, candidates, found, stride, segments, PIVOTS=PIVOTS, **cut,
            **choice,
        )  # fmt: skip
    return found
