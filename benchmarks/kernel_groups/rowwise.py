"""Norms, SwiGLU, RoPE and log-probabilities: what of the bandwidth of a copy they reach."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernel_groups import liger
from kernel_groups.timing import Row, randn, row, rows
from mainspring.ops.triton.log_probs import token_log_probs
from mainspring.ops.triton.norm import add_rms_norm, rms_norm, rms_norm_backward
from mainspring.ops.triton.rope import rope
from mainspring.ops.triton.swiglu import swiglu, swiglu_backward


def rowwise_rows() -> Iterator[Row]:
    m, h, inner = 16384, 4096, 12288
    x, residual, grad, weight = randn(m, h), randn(m, h), randn(m, h), randn(h)
    size = m * h * 2 / 1e9
    yield from rows(
        "rowwise", "rms_norm", 2 * size, "GB", [lambda: rms_norm(x, weight, 1e-5)],
        {"torch": [lambda: F.rms_norm(x, (h,), weight, 1e-5)], **liger.rms_norm(x, weight)},
    )  # fmt: skip
    yield from rows(
        "rowwise", "add_rms_norm", 4 * size, "GB", [lambda: add_rms_norm(x, residual, weight, 1e-5)],
        liger.add_rms_norm(x, residual, weight),
    )  # fmt: skip
    yield from rows(
        "rowwise", "rms_norm backward", 3 * size, "GB", [lambda: rms_norm_backward(x, weight, 1e-5, grad)],
        liger.rms_norm_backward(x, weight, grad),
    )  # fmt: skip
    yield from rows(
        "rowwise", "add_rms_norm backward", 4 * size, "GB",
        [lambda: rms_norm_backward(x, weight, 1e-5, grad, residual)],
        liger.add_rms_norm_backward(x, residual, weight, grad),
    )  # fmt: skip
    gate_up, grad_inner = randn(m, 2 * inner), randn(m, inner)
    size = m * inner * 2 / 1e9
    yield from rows("rowwise", "swiglu", 3 * size, "GB", [lambda: swiglu(gate_up)], liger.swiglu(gate_up))
    yield from rows(
        "rowwise", "swiglu backward", 5 * size, "GB", [lambda: swiglu_backward(gate_up, grad_inner)],
        liger.swiglu_backward(gate_up, grad_inner),
    )  # fmt: skip
    qkv = randn(4 * m, 48, 128)
    q, k, _ = qkv.split((32, 8, 8), 1)
    positions = torch.arange(4 * m, device="cuda")
    inv_freq = 10000.0 ** -(torch.arange(64, device="cuda") / 64)
    where = positions, inv_freq
    amount = 2 * 4 * m * 40 * 128 * 2 / 1e9
    yield from rows(
        "rowwise", "rope in place", amount, "GB", [lambda: rope(q, k, *where, in_place=True)],
        liger.rope(q, k, positions[:, None] * inv_freq),
    )  # fmt: skip
    grads = randn(4 * m, 32, 128), randn(4 * m, 8, 128)
    yield row("rowwise", "rope backward", amount, "GB", [lambda: rope(*grads, *where, inverse=True)])
    for count, vocab in ((64, 151936), (2048, 151936)):
        logits = randn(count, vocab, dtype=torch.float32)
        targets = torch.randint(0, vocab, (count,), device="cuda")
        yield row(
            "rowwise", f"token_log_probs {count}x{vocab}", count * vocab * 4 / 1e9, "GB",
            [lambda z=logits, t=targets: token_log_probs(z, t)],
            [lambda z=logits, t=targets: torch.log_softmax(z, -1).gather(1, t[:, None])], "torch",
        )  # fmt: skip
