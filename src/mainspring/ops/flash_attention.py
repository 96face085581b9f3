"""Attention over packed sequences with a backward pass of its own: what training runs, and what needs no cache.

Two PyTorch operators, `mainspring::flash_attention` and `mainspring::flash_attention_backward`, with shapes for
the compiler and a gradient for autograd; a table of implementations serves each. Sums are in free order; the
canonical one is in ops/attention.py, whose gradient the backward operator computes as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import flash_reference
from mainspring.ops.checks import check_boundaries
from mainspring.ops.cuda.support import refuses as cuda_refuses
from mainspring.ops.library.support import is_traced
from mainspring.ops.policy import FAST, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Call, Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses

ORDERED_KEYS = 2048  # of a sequence


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    policy: Policy = FAST,
) -> Tensor:
    """softmax(s) v for every sequence, with s = scale · q kᵀ, or softcap · tanh(scale · q kᵀ / softcap).

    Query i of the n queries of a sequence of m keys stands at position p = m - n + i. It sees key j if j <= p
    (causal) and j > p - window (with a window); the result is zero where it sees none. Query head h reads key
    head h // (Hq / Hkv). Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided.
        k: [Tk, Hkv, D]; Hkv divides Hq.
        v: likewise.
        cu_q: [S + 1] int32 from 0 to T: where sequences of queries begin and end.
        cu_k: [S + 1] int32 from 0 to Tk, of keys.
        max_q: at least the largest number of queries of a sequence.
        max_k: at least the largest number of keys.
        scale: factor of the scores, above 0.
        causal: whether a query sees no key after its position.
        window: sliding window in keys, or None for all.
        softcap: bound of the scores, or None.
        deterministic: whether the gradient's bits are the same in every run.
        policy: whether one backend is forced.

    Returns:
        [T, Hq, D] in q's dtype, differentiable once.

    Raises:
        BackendError: a dtype, shape or option that no backend takes.
    """
    _check(q, k, v, cu_q, cu_k, scale, window, softcap)
    check_boundaries("flash_attention", "cu_q", cu_q, q.shape[0], max_q)
    check_boundaries("flash_attention", "cu_k", cu_k, k.shape[0], max_k)
    arguments = (
        q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window or 0, softcap or 0.0, deterministic, policy.backend,
    )  # fmt: skip
    if is_traced():
        result: Tensor = flash_attention_op(*arguments)[0]
        return result
    # The operator's dispatch costs the host a quarter of a millisecond each way, more than many a kernel takes.
    if any_requires_grad(q, k, v):
        result = _FlashAttention.apply(*arguments)
        return result
    return _forward(*arguments)[0]


@torch.library.custom_op("mainspring::flash_attention", mutates_args=())
def flash_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, D], lse [Hq, T] float32 or wider); window and softcap are 0 for none."""
    return _forward(
        q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap, deterministic, backend
    )  # fmt: skip


@flash_attention_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _dim = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (heads, tokens), dtype=accumulator(q.dtype)
    )


@torch.library.custom_op("mainspring::flash_attention_backward", mutates_args=())
def flash_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from the result and the logarithms of its sums."""
    return _backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap, deterministic, backend
    )  # fmt: skip


@flash_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=like),
        torch.empty_like(k, memory_format=like),
        torch.empty_like(v, memory_format=like),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    grads = flash_attention_backward_op(grad, q, k, v, out, lse, cu_q, cu_k, *ctx.options)
    return (*grads, *(None,) * 10)


flash_attention_op.register_autograd(_gradient, setup_context=_keep)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
    causal: bool, window: int, softcap: float, deterministic: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = FLASH_ATTENTION.select(q, Policy("fast", backend), size=q.shape[2])
    return run(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, scale: float, causal: bool, window: int, softcap: float, deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = Call(q.device.type, q.dtype, FAST, True, q.shape[2])
    # Triton's two kernels keep no order among blocks and are the faster ones in most cases; CUDA C++'s blocks, which
    # add in order, are up to 1.3 times as fast for long causal sequences of narrow heads (H100, docs/results).
    ordered_wins = causal and q.shape[2] <= 64 and max_k >= ORDERED_KEYS
    if backend is None and deterministic and not ordered_wins and triton_refuses(call) is None:
        backend = "triton"
    run = FLASH_ATTENTION_BACKWARD.select(q, Policy("fast", backend), size=q.shape[2])
    return run(
        grad.contiguous(), q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap, deterministic
    )  # fmt: skip


class _FlashAttention(torch.autograd.Function):
    """What the two operators do, without their dispatch."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *options: Any
    ) -> Tensor:
        out, lse = _forward(q, k, v, cu_q, cu_k, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _backward(grad, *ctx.saved_tensors, *ctx.options)
        return (*grads, *(None,) * 10)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """What holds for every backend; each adds its own limits."""
    problem = None
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        problem = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [tokens, heads, head size]"
    elif not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        problem = f"q, k and v must share a floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    elif k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        problem = f"{k.shape[1]} key heads must divide the {q.shape[1]} query heads"
    elif (
        cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32 or cu_q.shape != cu_k.shape or cu_q.dim() != 1
    ):
        problem = (
            "cu_q and cu_k must be [sequences + 1] int32, not "
            f"{tuple(cu_q.shape)} {cu_q.dtype} and {tuple(cu_k.shape)} {cu_k.dtype}"
        )
    elif len({t.device for t in (q, k, v, cu_q, cu_k)}) > 1:
        problem = "q, k, v, cu_q and cu_k must be on one device"
    elif not scale > 0:
        problem = f"scale must be above 0, not {scale}"
    elif window is not None and window < 1:
        problem = f"window must be at least 1 key or None, not {window}"
    elif softcap is not None and not softcap > 0:
        problem = f"softcap must be above 0 or None, not {softcap}"
    if problem:
        raise BackendError(f"flash_attention: {problem}")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The formula, in fp32 or wider."""
    wide = accumulator(q.dtype)
    out, lse = flash_reference.forward(
        q.to(wide), k.to(wide), v.to(wide), cu_q, cu_k, scale, causal, window or None, softcap or None
    )
    return out.to(q.dtype), lse


def backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula's gradient, in fp32 or wider."""
    wide = accumulator(q.dtype)
    grads = flash_reference.backward(
        grad.to(wide), q.to(wide), k.to(wide), v.to(wide), out.to(wide), lse, cu_q, cu_k, scale, causal,
        window or None, softcap or None,
    )  # fmt: skip
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
    causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from mainspring.ops.cuda.flash_forward import flash_attention_forward

    return flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q=max_q, max_k=max_k, scale=scale, causal=causal, window=window or None,
        softcap=softcap or None,
    )  # fmt: skip


def _triton(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
    causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from mainspring.ops.triton.flash_forward import flash_attention_forward

    return flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q=max_q, max_k=max_k, scale=scale, causal=causal, window=window or None,
        softcap=softcap or None,
    )  # fmt: skip


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, scale: float, causal: bool, window: int, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from mainspring.ops.cuda.flash_backward import flash_attention_backward

    return flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q=max_q, max_k=max_k, scale=scale, causal=causal,
        window=window or None, softcap=softcap or None, deterministic=deterministic,
    )  # fmt: skip


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, scale: float, causal: bool, window: int, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from mainspring.ops.triton.flash_backward import flash_attention_backward

    return flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q=max_q, max_k=max_k, scale=scale, causal=causal,
        window=window or None, softcap=softcap or None, deterministic=deterministic,
    )  # fmt: skip


FLASH_ATTENTION = Operation(
    "flash_attention",
    Implementation("cuda", _cuda, cuda_refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
FLASH_ATTENTION_BACKWARD = Operation(
    "flash_attention_backward",
    Implementation("cuda", _cuda_backward, cuda_refuses),
    Implementation("triton", _triton_backward, triton_refuses),
    Implementation("reference", backward_reference, accepts_floats),
)
