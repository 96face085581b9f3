"""SwiGLU on the fused gate and up projection, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mainspring.ops.triton.support import check_dtype, has_dependent_launch, on_device, require

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up, out, stride, INNER: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    # The kernel behind may be brought up; it waits for all of this one, as this one for those ahead.
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INNER
    gate = tl.load(gate_up + row * stride + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + INNER + columns, inside, 0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * INNER + columns, result.to(out.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(gate_up, grad, out, stride, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """out: [rows, 2 · INNER], contiguous, as grad [rows, INNER] is."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INNER
    gate = tl.load(gate_up + row * stride + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + INNER + columns, inside, 0.0).to(tl.float32)
    g = tl.load(grad + row * INNER + columns, inside, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = g * up * (sigmoid + silu * (1.0 - sigmoid))
    target = out + row * (2 * INNER) + columns
    tl.store(target, d_gate.to(out.dtype.element_ty), inside)
    tl.store(target + INNER, (g * silu).to(out.dtype.element_ty), inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` where a row is (gate, up), in fp32, rounded once.

    Args:
        gate_up: [M, 2 I] float32, bfloat16 or float16.

    Returns:
        [M, I], contiguous.

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    gate_up, inner = _checked(gate_up)
    rows = gate_up.shape[0]
    out = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        with on_device(gate_up):
            early = has_dependent_launch(gate_up.device)
            swiglu_kernel[_grid(rows, inner)](
                gate_up, out, gate_up.stride(0), INNER=inner, BLOCK=BLOCK, EARLY=early, launch_pdl=early
            )
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `swiglu`'s input, [M, 2 I], given that of its output, [M, I]."""
    gate_up, inner = _checked(gate_up)
    rows = gate_up.shape[0]
    out = torch.empty((rows, 2 * inner), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        with on_device(gate_up):
            swiglu_backward_kernel[_grid(rows, inner)](
                gate_up, grad.contiguous(), out, gate_up.stride(0), INNER=inner, BLOCK=BLOCK
            )
    return out


def _checked(gate_up: Tensor) -> tuple[Tensor, int]:
    """(gate_up with contiguous rows, I)."""
    check_dtype("swiglu", gate_up)
    require(
        "swiglu",
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0,
        f"gate_up must be [M, 2 I], not {tuple(gate_up.shape)}",
    )
    return gate_up if gate_up.stride(1) == 1 else gate_up.contiguous(), gate_up.shape[1] // 2


def _grid(rows: int, inner: int) -> tuple[int, int]:
    return rows, triton.cdiv(inner, BLOCK)
