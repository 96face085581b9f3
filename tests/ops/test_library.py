"""The operations as PyTorch operators: what a compiler is told of them is true, and traced code computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.ops.library.linear import linear_op
from mainspring.ops.library.rowwise import add_rms_norm_op, rms_norm_op, rope_op, swiglu_op
from mainspring.ops.policy import Policy

POLICIES = [Policy("fast", "reference"), Policy("lockstep", "reference"), Policy("lockstep")]


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_(grad)


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
    "rms_norm": (rms_norm_op, ops.rms_norm, (normal(5, 16), normal(16), 1e-5)),
    "add_rms_norm": (
        add_rms_norm_op,
        ops.add_rms_norm,
        (normal(5, 16), normal(5, 16) * 2.0, normal(16), 1e-5),
    ),
    "swiglu": (swiglu_op, ops.swiglu, (normal(5, 16),)),
    "rope": (
        rope_op, ops.rope,
        (normal(5, 4, 8), normal(5, 2, 8), torch.tensor([0, 3, 1, 7, 2]), 0.1 ** torch.arange(3.0), None, 0.9, True),
    ),
    "linear": (linear_op, ops.linear, (normal(5, 16), normal(8, 16), normal(8), None)),
    "linear without bias": (
        linear_op, ops.linear, (normal(5, 16), normal(8, 16), None, torch.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_compiler_is_told_the_truth(name: str) -> None:
    operator, _, arguments = CALLS[name]
    leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(operator, (*leaves, True, "fast", "reference"))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
@pytest.mark.parametrize("name", [n for n in CALLS if "bias" not in n and n != "rope"])
def test_traced_code_computes_the_same(name: str, policy: Policy) -> None:
    _, function, arguments = CALLS[name]
    if name == "linear":
        arguments = arguments[:3]

    def loss(*inputs: Any) -> Tensor:
        out = function(*inputs, policy=policy)
        parts = out if isinstance(out, tuple) else (out,)
        return torch.stack([(p * p).sum() for p in parts]).sum()

    torch.compiler.reset()
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
        value = run(*leaves)
        value.backward()
        results.append((value.detach(), [x.grad for x in leaves if isinstance(x, Tensor)]))
    (eager, eager_grads), (traced, traced_grads) = results
    assert torch.equal(eager, traced)
    for a, b in zip(eager_grads, traced_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_of_whole_sequences_can_be_compiled() -> None:
    batch = ops.TokenBatch.packed([3, 5])
    policy = Policy("fast", "reference")

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, batch, layer=0, scale=0.5, policy=policy).square().sum()

    torch.compiler.reset()
    inputs = [normal(8, 4, 6), normal(8, 2, 6), normal(8, 2, 6)]
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        run(*leaves).backward()
        results.append([x.grad for x in leaves])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
def test_a_rotation_can_be_compiled(policy: Policy) -> None:
    q, k, positions, inv_freq = (x for x in CALLS["rope"][2][:4])

    def loss(q: Tensor, k: Tensor) -> Tensor:
        angles = ops.RopeAngles(positions, inv_freq)
        rotated = ops.rope(q, k, angles, policy=policy)
        return (rotated[0] * normal(5, 4, 8, grad=False)).sum() + (rotated[1] ** 3).sum()

    torch.compiler.reset()
    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
        run(*leaves).backward()
        results.append([x.grad for x in leaves])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
