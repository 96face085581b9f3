"""logsumexp of logits and log-probabilities of chosen tokens: the one routine behind the engine's reported
log-probabilities and the trainer's (csrc/kernels/log_softmax.cpp)."""

from __future__ import annotations

import torch

from mainspring.errors import BackendError
from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import require_kernels


def logsumexp(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Natural logarithm of the sum of `exp(logits / temperature)` over each row.

    Args:
        logits: [M, V] float32 on the CPU, last dimension contiguous.
        temperature: greater than 0.

    Returns:
        [M] float32.

    Raises:
        BackendError: a device, dtype or layout that the kernel does not take, or a temperature of 0 or less.
    """
    m, v, stride = _check("logsumexp", logits, temperature)
    out = torch.empty(m, dtype=torch.float32)
    require_kernels().log_softmax(logits.data_ptr(), stride, 0, out.data_ptr(), 0, m, v, temperature)
    return out


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`logits[m, targets[m]] / temperature - logsumexp(logits[m] / temperature)`.

    Args:
        logits: [M, V] float32 on the CPU, last dimension contiguous.
        targets: [M] int64, contiguous, each within [0, V).
        temperature: greater than 0.

    Returns:
        [M] float32.

    Raises:
        BackendError: a device, dtype or layout that the kernel does not take, a target outside the
            vocabulary, or a temperature of 0 or less.
    """
    m, v, stride = _check("token_log_probs", logits, temperature)
    if targets.dtype is not torch.int64 or targets.shape != (m,) or not targets.is_contiguous():
        raise reject(
            "token_log_probs", f"targets must be [{m}] int64, not {tuple(targets.shape)} of {targets.dtype}"
        )
    if m and not 0 <= int(targets.min()) <= int(targets.max()) < v:
        raise reject(
            "token_log_probs", f"a target lies outside the vocabulary of {v}: {targets.tolist()[:8]}..."
        )
    out = torch.empty(m, dtype=torch.float32)
    require_kernels().log_softmax(
        logits.data_ptr(), stride, targets.data_ptr(), 0, out.data_ptr(), m, v, temperature
    )
    return out


def _check(operation: str, logits: torch.Tensor, temperature: float) -> tuple[int, int, int]:
    if logits.dtype is not torch.float32 or not logits.is_cpu:
        raise BackendError(
            f"{operation}: logits must be float32 on the CPU, not {logits.dtype} on {logits.device}"
        )
    m, v = logits.shape
    stride, step = logits.stride()
    if step != 1 and v > 1:
        raise reject(operation, "the last dimension of logits must be contiguous; call .contiguous()")
    if not temperature > 0:
        raise reject(operation, f"temperature must be greater than 0, not {temperature}")
    return m, v, stride
