"""SwiGLU: silu(gate) · up (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.ops import library
from mainspring.ops.checks import described, reject
from mainspring.ops.cpu.support import refuses
from mainspring.ops.cpu.swiglu import swiglu as cpu_swiglu
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses


def swiglu(gate_up: Tensor, *, policy: Policy = LOCKSTEP) -> Tensor:
    """gate_up: [M, 2 · I], the gate first -> [M, I]."""
    if library.is_traced():
        return library.swiglu(gate_up, policy)
    return SWIGLU.select(gate_up, policy, any_requires_grad(gate_up))(gate_up, policy)


def reference(gate_up: Tensor, policy: Policy) -> Tensor:
    """The formula. Raises BackendError for another shape."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise reject("swiglu", f"gate_up must be [M, 2 I], not {described(gate_up)}")
    if policy.numerics == "fast":
        return _with_gradient(_fast_swiglu, gradient_reference, gate_up)
    # exp and exact arithmetic: torch's silu takes another code path for the last few elements of a tensor.
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.to(accumulator(gate.dtype))
    return (wide / (1 + torch.exp(-wide)) * up).to(gate_up.dtype)


def gradient_reference(gate_up: Tensor, grad: Tensor) -> Tensor:
    """(grad · up · silu'(gate), grad · silu(gate)), each half written where it belongs. [M, 2 · I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return d_gate_up


def _fast_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _with_gradient(
    kernel: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor], gate_up: Tensor
) -> Tensor:
    """kernel(gate_up); where a gradient is recorded it is `gradient`'s."""
    if not any_requires_grad(gate_up):
        return kernel(gate_up)
    result: Tensor = _Swiglu.apply(kernel, gradient, gate_up)
    return result


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, gradient: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gradient = gradient
        out: Tensor = kernel(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        return None, None, ctx.gradient(gate_up, grad)


def _cpu(gate_up: Tensor, policy: Policy) -> Tensor:
    return _with_gradient(cpu_swiglu, gradient_reference, gate_up)


def _triton(gate_up: Tensor, policy: Policy) -> Tensor:
    from mainspring.ops.triton import swiglu as triton

    return _with_gradient(triton.swiglu, _triton_gradient, gate_up)


def _triton_gradient(gate_up: Tensor, grad: Tensor) -> Tensor:
    from mainspring.ops.triton import swiglu as triton

    return triton.swiglu_backward(gate_up, grad)


SWIGLU = Operation(
    "swiglu",
    Implementation("cpu", _cpu, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
SWIGLU_BACKWARD = Operation(
    "swiglu_backward",
    Implementation("cpu", gradient_reference, refuses),
    Implementation("triton", _triton_gradient, triton_refuses),
    Implementation("reference", gradient_reference, accepts_floats),
)
