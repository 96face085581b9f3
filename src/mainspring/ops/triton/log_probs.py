"""logsumexp of logits, log-probabilities of chosen tokens and entropies, in canonical segments of a row.

A row is cut at multiples of SEGMENT; a segment gives its maximum and its sum of exponentials, and the segments are
merged left to right. Which program reads which segment changes no bit, so few rows can be spread over a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mainspring.ops.triton.support import (
    canonical_rows,
    has_dependent_launch,
    multiprocessors,
    on_device,
    require,
)

SEGMENT = 8192  # elements of a row whose sum has an order of its own
WARPS = 8
PROGRAMS_EACH = 16  # a multiprocessor: with more rows than that a program reads several segments
_COMBINED_ROWS = 32


@triton.jit
def segment_state(values, inverse_temperature, MOMENT: tl.constexpr):
    """(maximum m, sum of e^x, sum of x e^x) of a segment, where x = (z - m) / t; the last one only if MOMENT."""
    peak = tl.max(values, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    # Differences first: z / t - m / t could be fused into one that is not 0 at the maximum itself.
    x = (values - safe) * inverse_temperature
    weights = tl.exp(x)
    total = tl.sum(weights, 0)
    moment = 0.0
    if MOMENT:
        moment = tl.sum(tl.where(weights > 0, weights * x, 0.0), 0)
    return peak, total, moment


@triton.jit
def merge_states(
    peak, total, moment, next_peak, next_total, next_moment, inverse_temperature, MOMENT: tl.constexpr
):
    """The state of two neighbouring stretches of a row as one. The fused products are named, so that a scalar and
    a vector of rows come to the same bits."""
    highest = tl.maximum(peak, next_peak)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    before, after = (peak - safe) * inverse_temperature, (next_peak - safe) * inverse_temperature
    scale, next_scale = tl.exp(before), tl.exp(after)
    if MOMENT:
        # x is counted from the new maximum: sum (x + d) e^x = moment + d total
        shifted = tl.where(scale > 0, tl.fma(total, before, moment), 0.0)
        next_shifted = tl.where(next_scale > 0, tl.fma(next_total, after, next_moment), 0.0)
        moment = tl.fma(shifted, scale, next_shifted * next_scale)
    return highest, tl.fma(total, scale, next_total * next_scale), moment


@triton.jit
def log_prob_of(value, peak, log_total, inverse_temperature):
    """(z - m) / t - log(sum): exactly 0 where a row has one word."""
    return tl.fma(value - peak, inverse_temperature, -log_total)


@triton.jit(do_not_specialize=["inverse_temperature", "rows", "each"])
def segment_kernel(
    logits, partial, stride, rows, each, inverse_temperature, V: tl.constexpr, SEGMENT: tl.constexpr,
    MOMENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, groups of `each` segments). partial: [2 or 3, segments, rows] fp32."""
    if EARLY:
        gdc_launch_dependents()  # the merging kernel may be brought up meanwhile; it waits for all of this one
    row = tl.program_id(0).to(tl.int64)
    segments = tl.cdiv(V, SEGMENT)
    first = tl.program_id(1) * each
    for segment in range(first, min(first + each, segments)):
        index = segment * SEGMENT + tl.arange(0, SEGMENT)
        values = tl.load(logits + row * stride + index, index < V, float("-inf"))
        peak, total, moment = segment_state(values, inverse_temperature, MOMENT)
        target = partial + (row + segment * rows)
        tl.store(target, peak)
        tl.store(target + segments * rows, total)
        if MOMENT:
            tl.store(target + 2 * segments * rows, moment)


@triton.jit(do_not_specialize=["inverse_temperature", "rows"])
def combine_kernel(
    partial, logits, targets, out, entropies, stride, rows, inverse_temperature, V: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr, MOMENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merges each row's segments from left to right. Grid: (groups of ROWS rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    value = tl.zeros((ROWS,), tl.float32)
    if TARGETS:
        target = tl.load(targets + row, inside, 0)
        known = (target >= 0) & (target < V)
        value = tl.load(logits + row * stride + target, inside & known, float("nan"))
    if EARLY:
        gdc_wait()
    segments: tl.constexpr = (V + SEGMENT - 1) // SEGMENT
    peak = tl.load(partial + row, inside, 0.0)
    total = tl.load(partial + segments * rows + row, inside, 1.0)
    moment = tl.zeros((ROWS,), tl.float32)
    next_moment = tl.zeros((ROWS,), tl.float32)
    if MOMENT:
        moment = tl.load(partial + 2 * segments * rows + row, inside, 0.0)
    for segment in tl.static_range(1, segments):  # unrolled, so that all loads are under way at once
        source = partial + (row + segment * rows)
        next_peak = tl.load(source, inside, 0.0)
        next_total = tl.load(source + segments * rows, inside, 1.0)
        if MOMENT:
            next_moment = tl.load(source + 2 * segments * rows, inside, 0.0)
        peak, total, moment = merge_states(
            peak, total, moment, next_peak, next_total, next_moment, inverse_temperature, MOMENT
        )
    log_total = tl.log(total)
    if TARGETS:
        tl.store(out + row, log_prob_of(value, peak, log_total, inverse_temperature), inside)
    else:
        tl.store(out + row, tl.fma(peak, inverse_temperature, log_total), inside)
    if MOMENT:
        tl.store(entropies + row, log_total - moment / total, inside)


def logsumexp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Natural logarithm of the sum of `exp(logits / temperature)` over each row.

    Args:
        logits: [M, V] float32.
        temperature: greater than 0.

    Returns:
        [M] float32.

    Raises:
        BackendError: a dtype or shape that the kernel does not take, or a temperature of 0 or less.
    """
    return _run("logsumexp", logits, None, temperature, False)[0]


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """`logits[m, targets[m]] / temperature - logsumexp(logits[m] / temperature)`.

    Args:
        logits: [M, V] float32.
        targets: [M] int64. One outside the vocabulary gives NaN: to raise, the CPU would have to wait.
        temperature: greater than 0.

    Returns:
        [M] float32.

    Raises:
        BackendError: a dtype or shape that the kernel does not take, or a temperature of 0 or less.
    """
    _check_targets("token_log_probs", logits, targets)
    return _run("token_log_probs", logits, targets.contiguous(), temperature, False)[0]


def token_log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(`token_log_probs` to the same bits, the entropy in nats of softmax(logits / temperature)), each [M] float32.

    Arguments and errors as of `token_log_probs`.
    """
    name = "token_log_probs_and_entropy"
    _check_targets(name, logits, targets)
    return _run(name, logits, targets.contiguous(), temperature, True)


def _check_targets(operation: str, logits: Tensor, targets: Tensor) -> None:
    require(
        operation,
        targets.dtype is torch.int64 and targets.shape == logits.shape[:1],
        f"targets must be [{logits.shape[0]}] int64, not {tuple(targets.shape)} of {targets.dtype}",
    )


def _run(
    operation: str, logits: Tensor, targets: Tensor | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    require(
        operation,
        logits.dtype is torch.float32 and logits.dim() == 2 and logits.shape[1] > 0,
        f"logits must be [M, V] float32, not {tuple(logits.shape)} of {logits.dtype}",
    )
    require(operation, temperature > 0, f"temperature must be greater than 0, not {temperature}")
    rows, v = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropies = torch.empty_like(out) if entropy else out
    if rows:
        logits = canonical_rows(logits)
        stride = logits.stride(0) if rows > 1 else v
        segment = min(SEGMENT, triton.next_power_of_2(v))
        segments = triton.cdiv(v, segment)
        partial = torch.empty((2 + entropy, segments, rows), dtype=torch.float32, device=logits.device)
        each = segments_each(rows, segments, multiprocessors(logits.device))
        early = has_dependent_launch(logits.device)
        shared = {"V": v, "SEGMENT": segment, "MOMENT": entropy, "EARLY": early}
        with on_device(logits):
            segment_kernel[(rows, triton.cdiv(segments, each))](
                logits, partial, stride, rows, each, 1.0 / temperature, **shared, num_warps=WARPS,
            )  # fmt: skip
            combine_kernel[(triton.cdiv(rows, _COMBINED_ROWS),)](
                partial, logits, out if targets is None else targets, out, entropies, stride, rows,
                1.0 / temperature, **shared, ROWS=_COMBINED_ROWS, TARGETS=targets is not None, num_warps=1,
                launch_pdl=early,
            )  # fmt: skip
    return out, entropies


def segments_each(rows: int, segments: int, processors: int) -> int:
    """Segments that one program reads, so that there are about PROGRAMS_EACH programs a multiprocessor or fewer."""
    return max(1, min(segments, rows * segments // (processors * PROGRAMS_EACH)))
