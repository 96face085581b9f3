"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's half-split convention."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.ops.cpu import rope as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.gradient import kernel_with_formula_gradient
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad


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
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if not any_requires_grad(q, k):
        cpu.rope_(q, k, cos, sin)
        return q, k

    def kernel(a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        a, b = a.clone(memory_format=torch.contiguous_format), b.clone(memory_format=torch.contiguous_format)
        cpu.rope_(a, b, c, s)
        return a, b

    result: tuple[Tensor, Tensor] = kernel_with_formula_gradient(kernel, reference, q, k, cos, sin)
    return result


ROPE_ANGLES = Operation(
    "rope_angles",
    Implementation("cpu", cpu.rope_angles, refuses),
    Implementation("reference", angles_reference, accepts_all),
)
ROPE = Operation(
    "rope",
    Implementation("cpu", _cpu, refuses),
    Implementation("reference", reference, accepts_all),
)
