"""What stands between the QKV projection and attention without a cache, as one operation: norms of the heads, RoPE.

One operation, because its gradient is then one pass: autograd's own would write the gradients of q, k and v, of their
norms and of their rotations one by one, and join them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops import library
from mainspring.ops.checks import described, reject
from mainspring.ops.cpu.support import refuses
from mainspring.ops.norm import rms_norm
from mainspring.ops.norm_rope_cache import HeadNorms, check_head_norms
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.rope import RopeAngles, check_angles, rope
from mainspring.ops.triton.support import refuses as triton_refuses


def qkv_heads(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None,
    angles: RopeAngles,
    *,
    policy: Policy = LOCKSTEP,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) for `attention`: the heads of q and k normed, if there are norms, and rotated.

    qkv: [T, Hq + 2 Hkv, D], which may be overwritten where no gradient is recorded
    -> [T, Hq, D], [T, Hkv, D] and [T, Hkv, D]. The bits are those of `rms_norm` and `rope` on their own. Raises
    BackendError where shapes do not fit.
    """
    if qkv.dim() != 3 or min(num_heads, num_kv_heads) < 1 or qkv.shape[1] != num_heads + 2 * num_kv_heads:
        raise reject(
            "qkv_heads",
            f"{num_heads} + 2 · {num_kv_heads} heads are not those of qkv {described(qkv)}, [T, H, D]",
        )
    check_angles("qkv_heads", angles, qkv)
    if norms is not None:
        check_head_norms("qkv_heads", norms, qkv)
    weights = () if norms is None else (norms.q, norms.k)
    if library.is_traced():
        return composed(qkv, num_heads, num_kv_heads, norms, angles, policy)
    run = QKV_HEADS.select(qkv, policy, any_requires_grad(qkv, *weights))
    return run(qkv, num_heads, num_kv_heads, norms, angles, policy)


def composed(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None,
    angles: RopeAngles,
    policy: Policy,
) -> tuple[Tensor, Tensor, Tensor]:
    """One operation after the other."""
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q = rms_norm(q, norms.q, norms.eps, policy=policy)
        k = rms_norm(k, norms.k, norms.eps, policy=policy)
    q, k = rope(q, k, angles, policy=policy)
    return q, k, v


def _triton(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None,
    angles: RopeAngles,
    policy: Policy,
) -> tuple[Tensor, Tensor, Tensor]:
    # Other heads than of multiples of 16 elements lie as Triton cannot know: a row might be summed in another order.
    if 2 * angles.inv_freq.shape[-1] != qkv.shape[-1] or qkv.shape[-1] % 16:
        return composed(qkv, num_heads, num_kv_heads, norms, angles, policy)
    weights = None if norms is None else (norms.q, norms.k)
    eps = 0.0 if norms is None else norms.eps
    if not any_requires_grad(qkv, *(weights or ())):
        from mainspring.ops.triton import qkv_heads as triton

        return triton.qkv_heads(qkv, num_heads, num_kv_heads, weights, eps, *_where(angles), in_place=True)
    result: tuple[Tensor, Tensor, Tensor] = _Heads.apply(
        qkv, *(weights or (None, None)), eps, angles, num_heads, num_kv_heads
    )
    return result


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        angles: RopeAngles,
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from mainspring.ops.triton import qkv_heads as triton

        ctx.angles, ctx.eps = angles, eps
        normed = q_weight is not None and k_weight is not None
        ctx.save_for_backward(*((qkv, q_weight, k_weight) if normed else ()))
        weights = (q_weight, k_weight) if q_weight is not None and k_weight is not None else None
        # Detached: what is returned are no views to autograd, whose gradient would be another pass.
        return triton.qkv_heads(qkv.detach(), num_heads, num_kv_heads, weights, eps, *_where(angles))

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        from mainspring.ops.triton import qkv_heads as triton

        qkv, *weights = ctx.saved_tensors or (None,)
        gradients = triton.qkv_heads_backward(
            dq, dk, dv, qkv, tuple(weights) or None, ctx.eps, *_where(ctx.angles)
        )
        return *gradients, None, None, None, None


def _where(angles: RopeAngles) -> tuple[Tensor, Tensor, Tensor | None, float]:
    return angles.positions, angles.inv_freq, angles.rows, angles.scale


QKV_HEADS = Operation(
    "qkv_heads",
    Implementation("cpu", composed, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", composed, accepts_floats),
)
