"""Cross-entropy (or log-probability and entropy) of logits and its gradient, which takes the logits' place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.log_probs import log_prob_of, merge_states, segment_state
from mainspring.ops.triton.support import ALIGNMENT, check_dtype, on_device, require

SEGMENT = 16384  # elements of a row between two sums over a block
WARPS = 16


@triton.jit
def _capped(z, cap, CAP: tl.constexpr):
    """cap · tanh(z / cap), by a sigmoid whose exponential cannot overflow."""
    if CAP:
        fall = tl.exp(-2.0 * tl.abs(z) / cap)
        size = cap * ((1.0 - fall) / (1.0 + fall))
        z = tl.where(z < 0, -size, size)
    return z


@triton.jit(
    do_not_specialize=[
        "inverse_temperature",
        "cap",
        "smoothing",
        "z_loss",
        "ignore_index",
    ]
)
def cross_entropy_kernel(
    logits, targets, weights, entropy_weights, losses, gradient, stride, gradient_stride, inverse_temperature, cap,
    smoothing, z_loss, ignore_index, V: tl.constexpr, SEGMENT: tl.constexpr, CAP: tl.constexpr,
    SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr, ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A row a program: its state, its loss, then its gradient while much of the row is still in the L2 cache.

    The gradient may lie in the logits' own memory, at the same place or, where its elements are half as wide, in
    the upper half of the row: the second pass runs from right to left, so what it overwrites has been read.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    target = tl.load(targets + row)
    kept = target != ignore_index
    peak = tl.full((), 0.0, tl.float32)
    total = tl.full((), 1.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    plain_sum = tl.full((), 0.0, tl.float32)
    loss = tl.full((), 0.0, tl.float32)
    segments: tl.constexpr = (V + SEGMENT - 1) // SEGMENT
    lanes = tl.arange(0, SEGMENT)
    if kept:
        for segment in range(segments):
            index = segment * SEGMENT + lanes
            z = tl.load(z_row + index, index < V, float("-inf")).to(tl.float32)
            z = _capped(z, cap, CAP)
            if CAP:
                z = tl.where(index < V, z, float("-inf"))
            next_peak, next_total, next_moment = segment_state(z, inverse_temperature, ENTROPY)
            if SMOOTHING:
                plain_sum += tl.sum(tl.where(index < V, z, 0.0), 0)
            if segment == 0:
                peak, total = next_peak, next_total
                if ENTROPY:
                    moment = next_moment
            else:
                peak, total, moment = merge_states(
                    peak, total, moment, next_peak, next_total, next_moment, inverse_temperature, ENTROPY
                )
        known = (target >= 0) & (target < V)
        chosen = _capped(tl.load(z_row + target, known, float("nan")).to(tl.float32), cap, CAP)
        log_total = tl.log(total)
        loss = -log_prob_of(chosen, peak, log_total, inverse_temperature)
        log_sum = tl.fma(peak, inverse_temperature, log_total)
        if SMOOTHING:
            mean = plain_sum * (inverse_temperature / V)
            loss = (1.0 - smoothing) * loss + smoothing * (log_sum - mean)
        loss += z_loss * log_sum * log_sum
    tl.store(losses + row, loss)
    if GRADIENT:
        weight = tl.where(kept, inverse_temperature, 0.0)
        if WEIGHTED:
            weight *= tl.load(weights + row)
        log_total = tl.log(total)
        log_sum = tl.fma(peak, inverse_temperature, log_total)
        softmax_weight = weight * (1.0 + 2.0 * z_loss * log_sum)
        if ENTROPY:
            entropy_weight = tl.where(kept, inverse_temperature, 0.0) * tl.load(entropy_weights + row)
            entropy = log_total - moment / total
        tl.debug_barrier()
        for step in range(segments):
            index = (segments - 1 - step) * SEGMENT + lanes
            z = tl.load(z_row + index, index < V, float("-inf")).to(tl.float32)
            # Every thread has read its part of this segment before any of it is overwritten.
            tl.debug_barrier()
            capped = _capped(z, cap, CAP)
            log_p = tl.fma(capped - peak, inverse_temperature, -log_total)
            p = tl.exp(log_p)
            d = p * softmax_weight
            if ENTROPY:
                d -= entropy_weight * tl.where(p > 0, p * (log_p + entropy), 0.0)
            if SMOOTHING:
                d -= weight * (smoothing / V)
            d = tl.where(index == target, d - weight * (1.0 - smoothing), d)
            if CAP:
                ratio = capped / cap
                d *= 1.0 - ratio * ratio
            d = tl.where(kept, d, 0.0)
            tl.store(gradient + row * gradient_stride + index, d.to(gradient.dtype.element_ty), index < V)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each row's loss, and the gradient of the weighted losses and entropies by the logits; it consumes the logits.

    With x = cap(logits) / temperature, lse = logsumexp(x), e = label_smoothing:
    loss = (1 - e) (lse - x[target]) + e (lse - mean x) + z_loss lse², and 0 where target is ignore_index;
    gradient = d(sum_m weights[m] loss[m] + entropy_weights[m] entropy[m]) / d logits.

    Args:
        logits: [M, V] float32, bfloat16 or float16, contiguous. Overwritten if a gradient is asked for.
        targets: [M] int64. One outside the vocabulary that is not ignore_index makes its row's loss NaN.
        temperature: greater than 0.
        softcap: c in cap(z) = c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2), or None.
        label_smoothing: in [0, 1).
        z_loss: weight of lse² (PaLM, arXiv 2204.02311, section 5), at least 0.
        weights: [M] float32, or None for ones.
        entropy_weights: [M] float32, or None for zeros.
        gradient_dtype: dtype of the gradient, no wider than the logits; None for none.

    Returns:
        (losses [M] float32, gradient [M, V] in the logits' memory, its rows maybe strided, or None).

    Raises:
        BackendError: a dtype, shape or value that the kernel does not take.
    """
    name = "cross_entropy"
    check_dtype(name, logits)
    require(
        name,
        logits.dim() == 2 and logits.is_contiguous() and logits.data_ptr() % ALIGNMENT == 0 and logits.shape[1] > 0,
        f"logits must be [M, V], contiguous and aligned to {ALIGNMENT} bytes, not {tuple(logits.shape)}",
    )  # fmt: skip
    rows, v = logits.shape
    require(
        name,
        targets.dtype is torch.int64 and targets.shape == (rows,),
        f"targets must be [{rows}] int64, not {tuple(targets.shape)} of {targets.dtype}",
    )
    require(name, temperature > 0, f"temperature must be greater than 0, not {temperature}")
    require(name, softcap is None or softcap > 0, f"softcap must be greater than 0 or None, not {softcap}")
    require(name, 0 <= label_smoothing < 1, f"label_smoothing must be in [0, 1), not {label_smoothing}")
    require(name, z_loss >= 0, f"z_loss must be at least 0, not {z_loss}")
    for vector in (weights, entropy_weights):
        require(
            name,
            vector is None or (vector.shape == (rows,) and vector.dtype is torch.float32),
            f"weights must be [{rows}] float32",
        )
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    gradient = None if gradient_dtype is None else _in_place_of(logits, gradient_dtype)
    if rows:
        with on_device(logits):
            cross_entropy_kernel[(rows,)](
                logits, targets.contiguous(), _or(weights, losses), _or(entropy_weights, losses), losses,
                logits if gradient is None else gradient, v, v if gradient is None else gradient.stride(0),
                1.0 / temperature, 1.0 if softcap is None else softcap, label_smoothing, z_loss, ignore_index,
                V=v, SEGMENT=min(SEGMENT, triton.next_power_of_2(v)), CAP=softcap is not None,
                SMOOTHING=label_smoothing > 0, WEIGHTED=weights is not None, ENTROPY=entropy_weights is not None,
                GRADIENT=gradient is not None, num_warps=WARPS,
            )  # fmt: skip
    return losses, gradient


@triton.jit
def scale_kernel(x, scale, out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, index < size, 0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + index, value.to(out.dtype.element_ty), index < size)


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x · scale, multiplied in fp32 and rounded once to dtype. x: any shape, contiguous; scale: one float32."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        block = 4096
        with on_device(x):
            scale_kernel[(triton.cdiv(x.numel(), block),)](x.contiguous(), scale, out, x.numel(), BLOCK=block)
    return out


def _or(vector: Tensor | None, other: Tensor) -> Tensor:
    return other if vector is None else vector.contiguous()


def _in_place_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, V] of dtype in the memory of the logits: in the upper half of each row where it is half as wide."""
    require(
        "cross_entropy",
        dtype.itemsize == logits.element_size() or 2 * dtype.itemsize == logits.element_size(),
        f"a gradient of {dtype} does not fit into logits of {logits.dtype}",
    )
    if dtype.itemsize == logits.element_size():
        return logits.view(dtype)
    return logits.view(dtype)[:, logits.shape[1] :]
