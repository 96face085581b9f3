"""y = x Wᵀ + b."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.checks import check_product
from mainspring.ops.cpu.linear import linear as cpu_linear
from mainspring.ops.cpu.support import refuses
from mainspring.ops.cuda import support as cuda_support
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.quantised_linear import QUANTISED_LINEAR, QuantisedWeight
from mainspring.ops.registry import Call, Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses_fast_numerics as triton_refuses

ROW_TILE = 16  # rows of the reference's lockstep GEMM: every call it makes has a multiple of this many
ROW_BLOCK = 256  # and at most this many
FEW_ROWS = 256  # up to so many our kernels are faster than cuBLAS whatever the shape


def linear(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """x: [M, K] (rows may be strided), weight: [N, K], bias: [N] -> [M, N] in out_dtype (x's by default).

    Accumulates in fp32. In lockstep each row of the result is bitwise the same for every M. A quantised weight is
    multiplied as `quantised_linear` says. Raises BackendError for what the backend that serves it does not take.
    """
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise BackendError(f"linear: out_dtype must be a floating dtype, not {out_dtype}")
    if isinstance(weight, QuantisedWeight):
        product = QUANTISED_LINEAR.select(x, policy, any_requires_grad(x, bias))
        return product(x, weight, bias, out_dtype, policy)
    if library.is_traced():
        return library.linear(x, weight, bias, out_dtype, policy)
    run = LINEAR.select(x, policy, any_requires_grad(x, weight, bias))
    return run(x, weight, bias, out_dtype, policy)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    """The formula by torch's GEMM; in lockstep over row tiles whose shape does not depend on M. Raises BackendError."""
    check_product("linear", x, weight, bias)
    if policy.numerics == "fast":
        return _free_order(x, weight, bias, out_dtype)
    y = reference_rows(x, weight, bias)
    return y if out_dtype is None else y.to(out_dtype)


def _free_order(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """torch's GEMM in one call. On CUDA devices float32 results of narrow operands are its sums, not rounded first."""
    narrow = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    if narrow and out_dtype is torch.float32 and not any_requires_grad(x, weight, bias):
        y = torch.mm(x, weight.t(), out_dtype=out_dtype)
        return y if bias is None else y.add_(bias)
    y = F.linear(x, weight, bias)
    return y if out_dtype is None else y.to(out_dtype)


def reference_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's GEMM in row tiles whose shape does not depend on M, so that each row's bits are its own."""
    rows = x.shape[0]
    if rows == 0:
        return F.linear(x, weight, bias)
    padded = F.pad(x, (0, 0, 0, -rows % ROW_TILE))
    shape_free = _bits_do_not_depend_on_rows(
        weight.shape[0], weight.shape[1], x.dtype, x.device, torch.get_num_threads()
    )
    tiles = padded.split(ROW_BLOCK if shape_free else ROW_TILE)
    return torch.cat([F.linear(tile, weight, bias) for tile in tiles])[:rows]


@lru_cache(maxsize=1024)
def _bits_do_not_depend_on_rows(
    n: int, k: int, dtype: torch.dtype, device: torch.device, threads: int
) -> bool:
    """Whether torch's GEMM, on this machine, gives a row the same bits alone in a tile and in a block.

    True of oneDNN and MKL for most shapes (their K loop does not change with M from 16 rows on), but
    promised by neither, so it is tried once for each shape.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROW_BLOCK, k, generator=generator).to(device, dtype)
    weight = torch.randn(n, k, generator=generator).to(device, dtype)
    with torch.no_grad():
        expected = torch.cat([F.linear(tile, weight) for tile in x.split(ROW_TILE)])
        sizes = (32, 48, 64, 80, 112, 128, 192, 240, ROW_BLOCK)
        return all(torch.equal(F.linear(x[:m], weight), expected[:m]) for m in sizes)


class _KernelLinear(torch.autograd.Function):
    """A kernel forward, torch's GEMMs backward."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return kernel(x, weight, bias, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return (
            None,
            grad @ weight if ctx.needs_input_grad[1] else None,
            grad.t() @ x if ctx.needs_input_grad[2] else None,
            grad.sum(0) if ctx.needs_input_grad[3] else None,
            None,
        )


def _cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    if x.dim() != 2 or weight.dim() != 2:  # the kernel itself takes rows of any shape
        check_product("linear", x, weight)
    if any_requires_grad(x, weight, bias):
        result: Tensor = _KernelLinear.apply(cpu_linear, x, weight, bias, out_dtype)
        return result
    return cpu_linear(x, weight, bias, out_dtype)


def cuda_refuses(call: Call) -> str | None:
    """As `triton.support.refuses_fast_numerics`; but inference comes here, for its products of few rows."""
    if call.policy.numerics == "fast" and call.needs_grad and call.policy.backend != "cuda":
        return "cuBLAS, which is free to choose its order, is faster"
    return cuda_support.refuses(call)


def _cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    from mainspring.ops.cuda.linear import linear as cuda_linear

    # cuBLAS is up to a third faster than Triton's kernel, but takes 1.06 times as long as ours in the mean, 0.8 to 1.4
    # times (M 257 to 640, the layers of Qwen3-0.6B and Llama-3.1-8B, an H100).
    if policy.numerics == "fast" and policy.backend != "cuda" and _leaves_it_to_triton(x, weight):
        return _free_order(x, weight, bias, out_dtype)
    if any_requires_grad(x, weight, bias):
        result: Tensor = _KernelLinear.apply(cuda_linear, x, weight, bias, out_dtype)
        return result
    return cuda_linear(x, weight, bias, out_dtype)


def _leaves_it_to_triton(x: Tensor, weight: Tensor) -> bool:
    """Whether the CUDA C++ kernel does not serve so many rows itself."""
    from mainspring.ops.cuda.linear import choose_tile
    from mainspring.ops.triton.linear import k_chunk
    from mainspring.ops.triton.support import multiprocessors

    (m, k), n = x.shape, weight.shape[0]
    return m > FEW_ROWS and choose_tile(m, n, k, k_chunk(n, k), multiprocessors(x.device)) is None


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    from mainspring.ops.triton.linear import linear as triton_linear

    if any_requires_grad(x, weight, bias):
        result: Tensor = _KernelLinear.apply(triton_linear, x, weight, bias, out_dtype)
        return result
    return triton_linear(x, weight, bias, out_dtype)


LINEAR = Operation(
    "linear",
    Implementation("cpu", _cpu, refuses),
    Implementation(
        "cuda", _cuda, cuda_refuses
    ),  # few rows; many it hands to Triton's, whose bits are the same
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
