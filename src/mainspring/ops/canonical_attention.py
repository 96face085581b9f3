"""Causal attention of whole packed sequences on CUDA devices in canonical order, with a gradient.

The CUDA C++ and the Triton kernel give the same bits, which are also those of attention through a paged cache
(`ops.paged_attention`): so a trainer's rows are an engine's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mainspring.ops.batch import TokenBatch
from mainspring.ops.flash_attention import flash_attention_backward_op
from mainspring.ops.registry import any_requires_grad

Backend = Literal["cuda", "triton"]


def canonical_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, scale: float, window: int | None, backend: Backend
) -> Tensor:
    """q: [T, Hq, D], k, v: [T, Hkv, D] -> [T, Hq, D]; see `ops.attention`. The batch has no cache.

    Raises BackendError for what the backend does not take.
    """
    arguments = q, k, v, batch.cu_seqlens, batch.context_lens, max(batch.lengths), scale, window, backend
    if any_requires_grad(q, k, v):
        result: Tensor = _CanonicalAttention.apply(*arguments)
        return result
    return _forward(*arguments, needs_sums=False)[0]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    backend: Backend,
    needs_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, [Hq, T] logarithms of the sums of exponentials)."""
    if backend == "cuda":
        from mainspring.ops.cuda.flash_forward import flash_attention_forward

        return flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_q=longest, max_k=longest, scale=scale, window=window, canonical=True
        )  # fmt: skip
    from mainspring.ops.triton.attention import attention

    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device) if needs_sums else None
    out = attention(
        q, k, v, cu_seqlens, context_lens, None, scale, window, max_length=longest, max_context=longest, lse=lse
    )  # fmt: skip
    return out, lse


class _CanonicalAttention(torch.autograd.Function):
    """The canonical forward pass, whose bits lockstep needs; a backward pass in an order of its own, the same in
    every run."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        context_lens: Tensor,
        longest: int,
        scale: float,
        window: int | None,
        backend: Backend,
    ) -> Tensor:
        out, lse = _forward(
            q, k, v, cu_seqlens, context_lens, longest, scale, window, backend, needs_sums=True
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = (longest, longest, scale, True, window or 0, 0.0, True, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu = ctx.saved_tensors
        grads = flash_attention_backward_op(grad, q, k, v, out, lse, cu, cu, *ctx.options)
        return (*grads, None, None, None, None, None, None)
