"""SwiGLU of a projection: silu(x Wgᵀ + bg) · (x Wuᵀ + bu), in one kernel where that saves reading both again."""

from __future__ import annotations

from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.cpu.support import refuses
from mainspring.ops.cuda import support as cuda_support
from mainspring.ops.linear import linear
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Call, Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.swiglu import swiglu
from mainspring.ops.triton.support import refuses_fast_numerics as triton_refuses


def linear_swiglu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, policy: Policy = LOCKSTEP
) -> Tensor:
    """x: [M, K], weight: [2 · I, K], bias: [2 · I], the gate's rows first -> [M, I].

    In lockstep bitwise `swiglu(linear(x, weight, bias))`, whichever backend serves it. Raises BackendError.
    """
    if weight.shape[0] % 2:
        raise BackendError(f"linear_swiglu: weight must be [2 I, K], not {tuple(weight.shape)}")
    if library.is_traced():
        return two_operations(x, weight, bias, policy)
    run = LINEAR_SWIGLU.select(x, policy, any_requires_grad(x, weight, bias))
    return run(x, weight, bias, policy)


def two_operations(x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> Tensor:
    """The formula: a projection, rounded to x's dtype, and its gate."""
    return swiglu(linear(x, weight, bias, policy=policy), policy=policy)


def cuda_refuses(call: Call) -> str | None:
    """The gradient needs the projection itself."""
    if call.needs_grad:
        return "keeps nothing for the gradient"
    return cuda_support.refuses(call)


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> Tensor:
    from mainspring.ops.cuda.linear import linear_swiglu as fused

    out = fused(x, weight, bias)  # where order is free, too: cuBLAS would leave the gate to another kernel
    if out is not None:
        return out
    # The gate has no CUDA C++ kernel of its own that a policy could force.
    return swiglu(linear(x, weight, bias, policy=policy), policy=Policy(policy.numerics))


LINEAR_SWIGLU = Operation(
    "linear_swiglu",
    Implementation("cuda", _cuda, cuda_refuses),  # few rows
    Implementation("cpu", two_operations, refuses),
    Implementation("triton", two_operations, triton_refuses),
    Implementation("reference", two_operations, accepts_floats),
)
