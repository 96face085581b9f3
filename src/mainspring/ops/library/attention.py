"""Attention of whole sequences in canonical order as a PyTorch operator (in free order it is `flash_attention`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy
from mainspring.ops.registry import any_requires_grad

if TYPE_CHECKING:
    from mainspring.ops.batch import TokenBatch


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, scale: float, window: int | None, policy: Policy
) -> Tensor:
    """ops.attention.attention without a cache as an operator."""
    result: Tensor = packed_attention_op(
        q, k, v, batch.positions, batch.cu_seqlens, batch.context_lens, batch.lengths, scale, window,
        any_requires_grad(q, k, v), policy.numerics, policy.backend,
    )  # fmt: skip
    return result


@torch.library.custom_op("mainspring::packed_attention", mutates_args=())
def packed_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """q: [T, Hq, D], k, v: [T, Hkv, D] -> [T, Hq, D]; the batch is that of `TokenBatch.packed`."""
    from mainspring.ops.attention import ATTENTION
    from mainspring.ops.batch import TokenBatch

    policy, whole = policy_of(numerics, backend), tuple(lengths)
    batch = TokenBatch(positions, cu_seqlens, context_lens, whole, whole, whole)
    with torch.no_grad():
        run = ATTENTION.select(q, policy, needs_grad, q.shape[-1])
        return run(q, k, v, batch, layer=0, scale=scale, window=window, policy=policy)


@packed_attention_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, _, cu_seqlens, _, lengths, scale, window, _, _, backend = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)
    longest = max(lengths)
    forced = backend if backend in ("cuda", "triton", "reference") else None
    ctx.options = longest, longest, scale, True, window or 0, 0.0, True, forced


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By the flash backward kernels in an order of their own, the same in every run; they want the logarithms of the
    sums, which not every backend of the forward pass gives, so it is computed again."""
    from mainspring.ops.flash_attention import flash_attention_backward_op, flash_attention_op

    q, k, v, cu = ctx.saved_tensors
    out, lse = flash_attention_op(q, k, v, cu, cu, *ctx.options)
    grads = flash_attention_backward_op(grad.contiguous(), q, k, v, out, lse, cu, cu, *ctx.options)
    return (*grads, *(None,) * 9)


packed_attention_op.register_autograd(_gradient, setup_context=_keep)
