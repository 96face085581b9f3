"""Rotary position embedding (Su et al., arXiv 2104.09864), from inverse frequencies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.checks import check_heads, check_indices, described
from mainspring.ops.cpu import rope as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses


@dataclass(frozen=True, eq=False)
class RopeAngles:
    """The angles float32(position) · inv_freq of a stream's tokens, and a factor on their cosines and sines.

    positions: [T] int64. inv_freq: [R / 2] float32, where R elements of a head are rotated, or [N, R / 2] with
    rows: [T] int64, which says whose frequencies are a token's. Kernels on a GPU compute sines and cosines as they
    go; where they are dear, on the CPU, `table` computes them once for all layers that share these angles.
    """

    positions: Tensor
    inv_freq: Tensor
    rows: Tensor | None = None
    scale: float = 1.0
    _tables: dict[Policy, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.inv_freq.dtype is not torch.float32 or self.inv_freq.dim() != (1 if self.rows is None else 2):
            raise BackendError(
                "rope: inv_freq must be [R / 2] float32 (with rows [N, R / 2]), "
                f"not {tuple(self.inv_freq.shape)} of {self.inv_freq.dtype}"
            )
        for name, index in (("positions", self.positions), ("rows", self.rows)):
            if index is not None and (
                index.dtype is not torch.int64
                or index.dim() != 1
                or index.shape != self.positions.shape
                or index.device != self.inv_freq.device
            ):
                raise BackendError(f"rope: {name} must be [T] int64 beside inv_freq, not {described(index)}")
        if self.rows is not None:
            check_indices("rope", "row", self.rows, self.inv_freq.shape[0])

    def table(self, policy: Policy = LOCKSTEP) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, R / 2] float32: rounded once from float64."""
        if policy not in self._tables:
            run = ROPE_TABLE.select(self.inv_freq, policy)
            self._tables[policy] = run(self.positions, self.inv_freq, self.rows, self.scale)
        return self._tables[policy]


def check_angles(operation: str, angles: RopeAngles, heads: Tensor) -> None:
    """The angles are those of heads [T, H, D]. Raises BackendError."""
    positions, half = angles.positions, angles.inv_freq.shape[-1]
    if 2 * half > heads.shape[-1] or positions.shape != heads.shape[:1] or positions.device != heads.device:
        raise BackendError(
            f"{operation}: {half} frequencies and {positions.shape[0]} positions on {positions.device} do not fit "
            f"heads {described(heads)}"
        )


def rope(
    q: Tensor, k: Tensor, angles: RopeAngles, *, interleaved: bool = False, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """Rotates the first R of D elements of queries and keys. q: [T, Hq, D], k: [T, Hkv, D].

    A pair (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin). Pairs are (i, i + R / 2), Hugging Face's convention,
    or (2 i, 2 i + 1) if `interleaved`. Returns the rotated pair; where no gradient is recorded, q and k may be
    overwritten. Raises BackendError where shapes do not fit.
    """
    check_heads("rope", q, k)
    check_angles("rope", angles, q)
    if library.is_traced():
        return library.rope(q, k, angles, interleaved, policy)
    run = ROPE.select(q, policy, any_requires_grad(q, k))
    return run(q, k, angles, interleaved, policy)


def table_reference(
    positions: Tensor, inv_freq: Tensor, rows: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    # float64 functions of an fp32 angle: rounded to fp32 they do not depend on the vector lane they ran in.
    own = inv_freq if rows is None else inv_freq[rows]
    angle = (positions.to(torch.float32)[:, None] * own).to(torch.float64)
    return (angle.cos() * scale).to(torch.float32), (angle.sin() * scale).to(torch.float32)


def reference(
    q: Tensor, k: Tensor, angles: RopeAngles, interleaved: bool, policy: Policy
) -> tuple[Tensor, Tensor]:
    cos, sin = angles.table(policy)

    def kernel(q: Tensor, k: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        s = -sin if inverse else sin
        return _rotate(q, cos, s, interleaved), _rotate(k, cos, s, interleaved)

    return _rotation(kernel, q, k) if any_requires_grad(q, k) else kernel(q, k, False)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = (
        (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    )  # fmt: skip
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1) if rest.shape[-1] else turned.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: the same kernel with the sines' signs turned."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kernel = kernel
        rotated: tuple[Tensor, Tensor] = kernel(q, k, False)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kernel(grad_q, grad_k, True)


def _rotation(
    kernel: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]], q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """kernel(q, k, inverse), which leaves q and k as they are, with the gradient of a rotation."""
    result: tuple[Tensor, Tensor] = _Rotation.apply(kernel, q, k)
    return result


def _cpu(
    q: Tensor, k: Tensor, angles: RopeAngles, interleaved: bool, policy: Policy
) -> tuple[Tensor, Tensor]:
    if interleaved or 2 * angles.inv_freq.shape[-1] < q.shape[-1]:
        return reference(q, k, angles, interleaved, policy)  # the C++ kernel knows whole heads in halves
    cos, sin = angles.table(policy)

    def copies(q: Tensor, k: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
        cpu.rope_(q, k, cos, -sin if inverse else sin)
        return q, k

    if any_requires_grad(q, k):
        return _rotation(copies, q, k)
    cpu.rope_(q, k, cos, sin)
    return q, k


def _triton(
    q: Tensor, k: Tensor, angles: RopeAngles, interleaved: bool, policy: Policy
) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import rope as triton

    where = angles.positions, angles.inv_freq, angles.rows, angles.scale

    def kernel(q: Tensor, k: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return triton.rope(q, k, *where, interleaved=interleaved, inverse=inverse)

    if any_requires_grad(q, k):
        return _rotation(kernel, q, k)
    return triton.rope(q, k, *where, interleaved=interleaved, in_place=True)


def _cpu_table(
    positions: Tensor, inv_freq: Tensor, rows: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if rows is None:
        return cpu.rope_angles(positions, inv_freq, scale)
    cos = torch.empty(positions.shape[0], inv_freq.shape[1], dtype=torch.float32)
    sin = torch.empty_like(cos)
    for row in rows.unique().tolist():
        own = rows == row
        cos[own], sin[own] = cpu.rope_angles(positions[own], inv_freq[row].contiguous(), scale)
    return cos, sin


ROPE_TABLE = Operation(
    "rope_table",
    Implementation("cpu", _cpu_table, refuses),
    Implementation("reference", table_reference, accepts_floats),
)
ROPE = Operation(
    "rope",
    Implementation("cpu", _cpu, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
