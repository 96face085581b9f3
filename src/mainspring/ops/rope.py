"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's half-split convention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cpu import rope as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses


def rope_angles(
    positions: Tensor, inv_freq: Tensor, scale: float = 1.0, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · frequency, times `scale`.

    positions: [T] int64, inv_freq: [D / 2] float32 -> two of [T, D / 2] float32. The angle is an fp32 product.
    """
    return ROPE_ANGLES.select(inv_freq, policy)(positions, inv_freq, scale)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys. q: [T, Hq, D], k: [T, Hkv, D], cos, sin: [T, D / 2] float32.

    Returns the rotated pair; where no gradient is recorded, q and k may be overwritten.
    """
    return ROPE.select(q, policy, any_requires_grad(q, k))(q, k, cos, sin)


def angles_reference(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # float64 functions of an fp32 angle: rounded to fp32 they do not depend on the vector lane they ran in.
    angle = (positions.to(torch.float32)[:, None] * inv_freq).to(torch.float64)
    return (angle.cos() * scale).to(torch.float32), (angle.sin() * scale).to(torch.float32)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotation(_formula, q, k, cos, sin) if any_requires_grad(q, k) else _formula(q, k, cos, sin)


def _formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: the same kernel with the sines' signs turned."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.kernel = kernel
        ctx.save_for_backward(cos, sin)
        rotated: tuple[Tensor, Tensor] = kernel(q, k, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, *ctx.kernel(grad_q, grad_k, cos, -sin), None, None


def _rotation(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """kernel(q, k, cos, sin), which leaves q and k as they are, with the gradient of a rotation."""
    result: tuple[Tensor, Tensor] = _Rotation.apply(kernel, q, k, cos, sin)
    return result


def _cpu_copies(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
    cpu.rope_(q, k, cos, sin)
    return q, k


def _cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if any_requires_grad(q, k):
        return _rotation(_cpu_copies, q, k, cos, sin)
    cpu.rope_(q, k, cos, sin)
    return q, k


def _triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import rope as triton

    if any_requires_grad(q, k):
        return _rotation(triton.rope, q, k, cos, sin)
    return triton.rope(q, k, cos, sin, in_place=True)


def _triton_angles(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import rope as triton

    return triton.rope_angles(positions, inv_freq, scale)


ROPE_ANGLES = Operation(
    "rope_angles",
    Implementation("cpu", cpu.rope_angles, refuses),
    Implementation("triton", _triton_angles, triton_refuses),
    Implementation("reference", angles_reference, accepts_all),
)
ROPE = Operation(
    "rope",
    Implementation("cpu", _cpu, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_all),
)
