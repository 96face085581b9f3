"""Attention as models call it on a GPU: gradients in both numerics, compiled whole, on either kernel backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.ops import flash_reference
from mainspring.ops.cuda.support import refuses as cuda_refuses
from mainspring.ops.flash_attention import flash_attention, flash_attention_op
from mainspring.ops.policy import Policy
from mainspring.ops.registry import Call
from support.triton_kernels import INTERPRETED, assert_same_bits, random_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="the kernels of this file run on GPUs alone"),
]
LENGTHS = [200, 1, 63, 130]
BF16 = torch.bfloat16


def _backends() -> list[str]:
    if not torch.cuda.is_available() or cuda_refuses(Call("cuda", BF16, Policy("fast"), True, 128)):
        return ["triton"]
    return ["cuda", "triton"]


def inputs(d: int, grad: bool = True) -> list[Tensor]:
    tokens = sum(LENGTHS)
    return [
        random_tensor(i, tokens, heads, d, dtype=BF16).requires_grad_(grad)
        for i, heads in enumerate((8, 2, 2))
    ]


def gradients(run: object, leaves: list[Tensor]) -> list[Tensor]:
    out = run(*leaves)
    weights = random_tensor(9, *out.shape, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def expected(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    cu = ops.TokenBatch.packed(LENGTHS, device="cuda").cu_seqlens
    wide = [x.detach().to(dtype).requires_grad_() for x in leaves]
    return gradients(lambda q, k, v: flash_reference.forward(q, k, v, cu, cu, 0.1)[0], wide)


def assert_close(found: list[Tensor], leaves: list[Tensor]) -> None:
    """Errors at most twice those of the formula in bfloat16, and a rounding."""
    for got, low, exact in zip(found, expected(leaves, BF16), expected(leaves, torch.float32), strict=True):
        error = (got.float() - exact).abs().max()
        allowed = 2 * (low.float() - exact).abs().max() + 1e-2 * exact.abs().max() / 2
        assert error <= allowed, f"{error} > {allowed}"


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("policy", [Policy("lockstep"), Policy("fast"), Policy("fast", "flash")], ids=str)
def test_training_attention(policy: Policy, d: int) -> None:
    batch = ops.TokenBatch.packed(LENGTHS, device="cuda")
    leaves = inputs(d)
    found = gradients(
        lambda q, k, v: ops.attention(q, k, v, batch, layer=0, scale=0.1, policy=policy), leaves
    )
    assert_close(found, leaves)
    if policy.numerics == "lockstep":  # the gradient is the same in every run, and the forward without it
        again = gradients(
            lambda q, k, v: ops.attention(q, k, v, batch, layer=0, scale=0.1, policy=policy), leaves
        )
        for a, b in zip(found, again, strict=True):
            assert_same_bits(a, b)
        with torch.no_grad():
            assert_same_bits(found[0], ops.attention(*leaves, batch, layer=0, scale=0.1, policy=policy))


@pytest.mark.parametrize("backend", _backends())
def test_each_backend_under_a_compiler_and_in_a_graph(backend: str) -> None:
    cu = ops.TokenBatch.packed(LENGTHS, device="cuda").cu_seqlens
    leaves = inputs(128)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(
            q,
            k,
            v,
            cu,
            cu,
            max_q=200,
            max_k=200,
            scale=0.1,
            deterministic=True,
            policy=Policy("fast", backend),
        )

    eager = gradients(run, leaves)
    assert_close(eager, leaves)
    torch.compiler.reset()
    for a, b in zip(eager, gradients(torch.compile(run, fullgraph=True), leaves), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*leaves)
        captured.fill_(torch.nan)
        graph.replay()
        assert_same_bits(captured, eager[0])


@pytest.mark.parametrize("backend", _backends())
def test_the_operators_tell_a_compiler_the_truth(backend: str) -> None:
    cu = ops.TokenBatch.packed(LENGTHS, device="cuda").cu_seqlens
    arguments = (200, 200, 0.1, True, 0, 0.0, True, backend)
    torch.library.opcheck(flash_attention_op, (*inputs(64), cu, cu, *arguments), rtol=2e-2, atol=2e-2)


FIRST_GRADIENT = """
import torch
from mainspring import ops
from mainspring.ops.flash_attention import flash_attention
from mainspring.ops.policy import Policy

cu = torch.tensor([0, 200], dtype=torch.int32, device="cuda")
q, k, v = (torch.randn(200, 2, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
out = flash_attention(q, k, v, cu, cu, max_q=200, max_k=200, scale=0.1, policy=Policy("fast", "cuda"))
assert all(g.isfinite().all() for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
"""


@pytest.mark.skipif("cuda" not in _backends(), reason="the CUDA C++ kernels need Hopper and nvcc")
def test_the_first_gradient_of_a_process_may_be_that_of_attention() -> None:
    """Autograd's thread has then made no call of the CUDA runtime: it has no current context."""
    subprocess.run([sys.executable, "-c", FIRST_GRADIENT], check=True, timeout=200)
