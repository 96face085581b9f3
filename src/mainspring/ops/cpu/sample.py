"""`ops.sample` for the CPU, a row at a time (it stays in the cache), with noise for the tokens that can win only."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mainspring.ops.sampling_tensors import (
    GOLDEN,
    LARGEST_UNIFORM,
    MASS_UNIT,
    SMALL_UNIFORM,
    SMALLEST_TEMPERATURE,
    SamplingTensors,
)

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]

_FIRST_REACH = 10.0  # nats below the peak in which the floor is looked for first; then everywhere
_SMALLEST = np.float32(SMALLEST_TEMPERATURE)
_SLACK = 1.001  # of a bound whose two sides are rounded


def sample(
    logits: Tensor, params: SamplingTensors, seats: Tensor, positions: Tensor, truncate: bool
) -> Tensor:
    """See `ops.sample.sample`; all tensors on the CPU."""
    rows = logits.numpy()
    words = params.rows.numpy()[seats.numpy()]  # a copy, [N, ROW_WORDS]
    own = SamplingTensors.over(torch.from_numpy(words))
    temperatures = own.temperature.numpy()
    if not temperatures.any():
        return torch.from_numpy(rows.argmax(-1))  # NumPy's takes a tenth of the time of torch's
    bases = _mix(own.key.numpy().view(np.uint64) + _steps_to(positions))
    top_k, top_p, min_p = (tensor.tolist() for tensor in (own.top_k, own.top_p, own.min_p))
    tokens = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        t = temperatures[i]
        floor = _floor(row, t, top_k[i], top_p[i], min_p[i]) if truncate and t > 0 else None
        if t == 0:
            tokens[i] = row.argmax()
        elif floor is None:
            tokens[i] = _draw(row, t, bases[i])
        else:
            kept = np.flatnonzero(row >= floor)
            scores = row[kept] + t * _noise(_uniform(_halves(bases[i], kept)))
            tokens[i] = kept[scores.argmax()]
    return torch.from_numpy(tokens)


def _draw(row: Floats, t: np.float32, base: np.uint64) -> int:
    """argmax(row + t noise), where the noise's logarithms are taken for few.

    The likeliest token's score is a bound that the winner passes: z + t g > bound. As exp(-g) = -log(1 - w) >= w,
    only tokens with w < exp((z - bound) / t) can.
    """
    peak = int(row.argmax())
    half = _halves(base, np.array([peak]))
    bound = row[peak] + t * _noise(_uniform(half))[0]
    if not np.isfinite(bound):
        return peak
    # Tiny temperatures divide to infinities, which compare as they should.
    with np.errstate(over="ignore"):
        limit = row - bound
        limit *= np.float32(1.0) / max(t, _SMALLEST)
        np.exp(limit, out=limit)
    limit *= np.float32(_SLACK * 2.0**32)  # w in units of 2^-32, in which it is an integer and a half
    halves = _mix(base + _steps(len(row))).view(np.uint32)[: len(row)]
    able = np.flatnonzero(halves.astype(np.float32) <= limit)
    scores = row[able] + t * _noise(_uniform(halves[able]))
    # The likeliest is able too, but for rounding.
    return int(able[scores.argmax()]) if len(able) and scores.max() > bound else peak


def _floor(row: Floats, t: np.float32, top_k: int, top_p: float, min_p: float) -> np.float32 | None:
    """The smallest logit that min-p, top-k and top-p leave, or None if they leave all. See `ops.sample.floors`."""
    limited = 0 < top_k < len(row)
    if not limited and top_p >= 1.0 and min_p <= 0.0:
        return None
    t = max(t, _SMALLEST)
    peak = np.float32(row.max())
    if np.isneginf(peak):
        return peak
    floor = np.float32(-np.inf)
    if min_p > 0.0:
        floor = np.float32(peak + t * np.log(np.float32(min_p)))
    if not limited and top_p >= 1.0:
        return floor
    whole = None if limited else int(_masses(row[row >= floor], peak, t).sum())
    for reach in (_FIRST_REACH, np.inf):
        lowest = max(floor, np.float32(peak - np.float32(reach) * t)) if reach < np.inf else floor
        ordered = -np.sort(-row[row >= lowest])
        everything = lowest <= floor
        if limited:
            if len(ordered) < top_k and not everything:
                continue
            kth = ordered[min(top_k, len(ordered)) - 1]
            ordered = ordered[ordered >= kth]
            floor = max(floor, kth)
        if top_p >= 1.0:
            return floor
        mass = _masses(ordered, peak, t)
        reached = mass.cumsum()
        wanted = max(1, int(np.float64(top_p) * np.float64(reached[-1] if whole is None else whole)))
        if reached[-1] < wanted and not everything and not limited:
            continue
        num_kept = int((reached - mass < wanted).sum())
        return np.float32(max(floor, ordered[num_kept - 1]))
    raise AssertionError("the second reach is everything")


def _masses(logits: Floats, peak: np.float32, t: np.float32) -> npt.NDArray[np.int64]:
    with np.errstate(over="ignore"):
        masses: npt.NDArray[np.int64] = (np.exp((logits - peak) / t) * np.float32(MASS_UNIT)).astype(np.int64)
    return masses


def _noise(w: Floats) -> Floats:
    """See `ops.sample.token_noise`."""
    series = w * (1 + w * (np.float32(0.5) + w * np.float32(1 / 3)))
    exponential = np.where(w < SMALL_UNIFORM, series, -np.log(1 - w))
    noise: Floats = -np.log(exponential)
    return noise


def _uniform(halves: npt.NDArray[np.uint32]) -> Floats:
    w = halves.astype(np.float32)
    w *= np.float32(2.0**-32)
    w += np.float32(2.0**-33)
    return np.minimum(w, np.float32(LARGEST_UNIFORM), out=w)


def _halves(base: np.uint64, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """The halves of a stream that belong to these tokens."""
    words = _mix(base + ((tokens >> 1) + 1).astype(np.uint64) * np.uint64(GOLDEN))
    low, high = words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)
    return np.where(tokens & 1, high, low)


def _steps_to(positions: Tensor) -> Words:
    return (positions.numpy() + 1).astype(np.uint64) * np.uint64(GOLDEN)


@lru_cache(maxsize=8)
def _steps(vocab_size: int) -> Words:
    return np.arange(1, (vocab_size + 1) // 2 + 1, dtype=np.uint64) * np.uint64(GOLDEN)


def _mix(value: Words) -> Words:
    """The finaliser of SplitMix64, in place."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value
