"""SwiGLU: silu(gate) · up (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.ops.cpu.support import refuses
from mainspring.ops.cpu.swiglu import swiglu as cpu_swiglu
from mainspring.ops.gradient import kernel_with_formula_gradient
from mainspring.ops.policy import FAST, LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad


def swiglu(gate_up: Tensor, *, policy: Policy = LOCKSTEP) -> Tensor:
    """gate_up: [M, 2 · I], the gate first -> [M, I]."""
    return SWIGLU.select(gate_up, policy, any_requires_grad(gate_up))(gate_up, policy)


def reference(gate_up: Tensor, policy: Policy) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if policy.numerics == "fast":
        return F.silu(gate) * up
    # exp and exact arithmetic: torch's silu takes another code path for the last few elements of a tensor.
    wide = gate.to(accumulator(gate.dtype))
    return (wide / (1 + torch.exp(-wide)) * up).to(gate_up.dtype)


def _cpu(gate_up: Tensor, policy: Policy) -> Tensor:
    if not any_requires_grad(gate_up):
        return cpu_swiglu(gate_up)
    result: Tensor = kernel_with_formula_gradient(cpu_swiglu, lambda x: reference(x, FAST), gate_up)
    return result


SWIGLU = Operation(
    "swiglu",
    Implementation("cpu", _cpu, refuses),
    Implementation("reference", reference, accepts_all),
)
