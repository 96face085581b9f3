"""logsumexp of logits and log-probabilities of chosen tokens: one kernel behind both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import canonical_rows, on_device, require


@triton.jit(do_not_specialize=["inverse_temperature"])
def log_softmax_kernel(
    logits,
    targets,
    out,
    stride,
    inverse_temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """One read of a row: each of BLOCK lanes keeps a running maximum and sum, joined at the end. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        inside = first + lanes < V
        value = tl.load(logits + row * stride + first + lanes, inside, float("-inf"))
        new_peak = tl.maximum(peak, value)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # Differences first: z · t - peak · t could be fused into one that is not 0 at the peak itself.
        before = tl.exp((peak - safe) * inverse_temperature)
        total = tl.fma(total, before, tl.exp((value - safe) * inverse_temperature))
        peak = new_peak
    highest = tl.max(peak, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    log_total = tl.log(tl.sum(total * tl.exp((peak - safe) * inverse_temperature), 0))
    if TARGETS:
        target = tl.load(targets + row)
        known = (target >= 0) & (target < V)
        value = tl.load(logits + row * stride + target, known, float("nan"))
        tl.store(out + row, (value - highest) * inverse_temperature - log_total)
    else:
        tl.store(out + row, highest * inverse_temperature + log_total)


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
    return _run("logsumexp", logits, None, temperature)


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
    require(
        "token_log_probs",
        targets.dtype is torch.int64 and targets.shape == logits.shape[:1],
        f"targets must be [{logits.shape[0]}] int64, not {tuple(targets.shape)} of {targets.dtype}",
    )
    return _run("token_log_probs", logits, targets.contiguous(), temperature)


def _run(operation: str, logits: Tensor, targets: Tensor | None, temperature: float) -> Tensor:
    require(
        operation,
        logits.dtype is torch.float32 and logits.dim() == 2 and logits.shape[1] > 0,
        f"logits must be [M, V] float32, not {tuple(logits.shape)} of {logits.dtype}",
    )
    require(operation, temperature > 0, f"temperature must be greater than 0, not {temperature}")
    rows, v = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        logits = canonical_rows(logits)
        block = min(8192, triton.next_power_of_2(v))
        with on_device(logits):
            log_softmax_kernel[(rows,)](
                logits, out if targets is None else targets, out, logits.stride(0) if rows > 1 else v,
                1.0 / temperature, V=v, BLOCK=block, TARGETS=targets is not None,
                num_warps=16 if block == 8192 else 4,
            )  # fmt: skip
    return out
