"""The operations as PyTorch operators: what a compiler is told of them is true, and traced code computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.ops import KVCache, SamplingTensors, TokenBatch
from mainspring.ops.flash_attention import flash_attention_backward_op, flash_attention_op
from mainspring.ops.library.attention import packed_attention_op
from mainspring.ops.library.cache import paged_attention_op, rope_write_cache_op
from mainspring.ops.library.experts import combine_op, grouped_linear_op, route_op
from mainspring.ops.library.linear import linear_op, linear_tp_invariant_op
from mainspring.ops.library.losses import (
    linear_cross_entropy_op,
    linear_log_probs_op,
    row_cross_entropy_op,
    token_log_probs_op,
)
from mainspring.ops.library.rowwise import add_rms_norm_op, rms_norm_op, rope_op, swiglu_op
from mainspring.ops.library.sampling import adjust_logits_op, sample_op
from mainspring.ops.policy import Policy

POLICIES = [Policy("fast", "reference"), Policy("fast"), Policy("lockstep", "reference"), Policy("lockstep")]
REFERENCE = ("fast", "reference")


def normal(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator).requires_grad_(grad)


POSITIONS = torch.tensor([0, 3, 1, 7, 2])
INV_FREQ = 0.1 ** torch.arange(3.0)
TARGETS = torch.tensor([3, -100, 0, 10, 5])
KEPT = TARGETS.clamp_min(0)
ROUTING = ops.route(normal(5, 4, grad=False), 2, normalise=True, policy=Policy(*REFERENCE))
GATHERED = (ROUTING.offsets, ROUTING.tokens, ROUTING.places)


def packed_cache(dtype: torch.dtype = torch.float32) -> tuple[TokenBatch, Tensor, Tensor]:
    """A batch of 3 + 1 tokens over a cache of one layer, and its keys and values."""
    cache = KVCache.allocate(1, 6, 4, 2, 8, dtype, "cpu")
    for tensor in (*cache.k, *cache.v):
        tensor.copy_(normal(6, 4, 2, 8, grad=False, seed=7))
    return TokenBatch.paged([3, 1], [7, 4], [[3, 1], [5]], cache), cache.k[0], cache.v[0]


BATCH, K_CACHE, V_CACHE = packed_cache()
PACKED = TokenBatch.packed([3, 2])
PACKED_HEADS = normal(5, 4, 8), normal(5, 2, 8), normal(5, 2, 8, seed=1)
WHERE = PACKED.positions, PACKED.cu_seqlens, PACKED.context_lens, PACKED.lengths
SEATS = SamplingTensors.allocate(3)
SEATS.temperature.fill_(0.7)
SEATS.presence.fill_(0.5)
HISTORY = torch.arange(33, dtype=torch.int32).view(3, 11) % 3
HEADS = normal(4, 4, 8, grad=False), normal(4, 2, 8, grad=False), normal(4, 2, 8, grad=False, seed=1)

# The operators and their arguments, all but numerics and backend.
OPERATORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "rms_norm": (rms_norm_op, (normal(5, 16), normal(16), 1e-5, True)),
    "add_rms_norm": (add_rms_norm_op, (normal(5, 16), normal(5, 16) * 2.0, normal(16), 1e-5, True)),
    "swiglu": (swiglu_op, (normal(5, 16), True)),
    "rope": (
        rope_op, (normal(5, 4, 8), normal(5, 2, 8), POSITIONS, INV_FREQ, None, 0.9, True, True),
    ),
    "linear": (linear_op, (normal(5, 16), normal(8, 16), normal(8), None, True)),
    "linear without bias": (linear_op, (normal(5, 16), normal(8, 16), None, torch.float32, True)),
    "linear_tp_invariant": (
        linear_tp_invariant_op, (normal(5, 16), normal(8, 16), normal(8), torch.float32, 4, True),
    ),
    "linear_cross_entropy": (
        linear_cross_entropy_op,
        (normal(5, 16), normal(11, 16), TARGETS, True, 1.0, 20.0, 0.1, 1e-3, -100, True),
    ),
    "linear_cross_entropy without gradients": (
        linear_cross_entropy_op,
        (normal(5, 16, grad=False), normal(11, 16, grad=False), TARGETS, False, 1.0, None, 0.0, 0.0, -100, False),
    ),
    "row_cross_entropy": (
        row_cross_entropy_op, (normal(5, 16), normal(11, 16), TARGETS, 1.0, None, 0.0, 1e-3, -100, True),
    ),
    "linear_log_probs": (linear_log_probs_op, (normal(5, 16), normal(11, 16), KEPT, 0.8, False, True)),
    "linear_log_probs with entropy": (
        linear_log_probs_op, (normal(5, 16), normal(11, 16), KEPT, 0.8, True, True),
    ),
    "token_log_probs": (token_log_probs_op, (normal(5, 11), KEPT, 0.8, False)),
    "token_log_probs with entropy": (token_log_probs_op, (normal(5, 11), KEPT, 0.8, True)),
    "route": (route_op, (normal(5, 4), 2, False, torch.float32, True)),
    "route normalised": (route_op, (normal(5, 4), 2, True, torch.bfloat16, True)),
    "grouped_linear": (
        grouped_linear_op, (normal(10, 6), normal(4, 8, 6), ROUTING.offsets, None, None, True),
    ),
    "grouped_linear of gathered rows": (grouped_linear_op, (normal(5, 6), normal(4, 8, 6), *GATHERED, True)),
    "combine": (combine_op, (normal(10, 6), normal(5, 2), ROUTING.places, ROUTING.order, True)),
    "rope_write_cache": (
        rope_write_cache_op,
        (*HEADS, BATCH.positions, INV_FREQ, None, 0.9, BATCH.slots, K_CACHE, V_CACHE, None, None, False),
    ),
    "paged_attention": (
        paged_attention_op,
        (
            *HEADS, BATCH.positions, BATCH.cu_seqlens, BATCH.context_lens, BATCH.lengths, BATCH.contexts, BATCH.slots,
            BATCH.block_tables, K_CACHE, V_CACHE, None, None, 0.5, 3,
        ),
    ),
    "paged_attention of what is in the cache": (
        paged_attention_op,
        (
            HEADS[0], None, None, BATCH.positions, BATCH.cu_seqlens, BATCH.context_lens, BATCH.lengths, BATCH.contexts,
            BATCH.slots, BATCH.block_tables, K_CACHE, V_CACHE, None, None, 0.5, None,
        ),
    ),
    "packed_attention": (packed_attention_op, (*PACKED_HEADS, *WHERE, 0.5, 2, True)),
    "sample": (sample_op, (normal(3, 11, grad=False), SEATS.rows, KEPT[:3] % 3, POSITIONS[:3], True)),
    "adjust_logits": (
        adjust_logits_op, (normal(3, 11, grad=False), SEATS.rows, torch.arange(3), HISTORY, None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiler_is_told_the_truth(name: str) -> None:
    operator, arguments = OPERATORS[name]
    copies = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments
    ]
    torch.library.opcheck(operator, (*copies, *REFERENCE))


# Their last argument is a backend alone.
CU = PACKED.cu_seqlens
FLASH = CU, CU, 3, 3, 0.5, True, 0, 0.0, True, "reference"


def test_a_compiler_is_told_the_truth_of_flash_attention() -> None:
    torch.library.opcheck(flash_attention_op, (*PACKED_HEADS, *FLASH))
    q, k, v = (x.detach() for x in PACKED_HEADS)
    out, lse = flash_attention_op(q, k, v, *FLASH)
    torch.library.opcheck(flash_attention_backward_op, (torch.ones_like(out), q, k, v, out, lse, *FLASH))


def test_every_operator_is_checked() -> None:
    """Gradients' operators are checked with those whose gradients they are, which opcheck differentiates."""
    checked = {operator._qualname for operator, _ in OPERATORS.values()}
    gradients = {
        f"mainspring::{name}"
        for name in (
            "rms_norm_backward", "swiglu_backward", "route_backward", "combine_backward", "grouped_linear_backward",
            "token_log_probs_backward", "recomputed_gradients", "scaled",
        )
    }  # fmt: skip
    flash = {"mainspring::flash_attention", "mainspring::flash_attention_backward"}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mainspring::")}
    assert registered == checked | gradients | flash


@dataclass(frozen=True)
class Call:
    """A public function of tensors that are differentiated, with its other arguments bound."""

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]


def _experts(x: Tensor, router: Tensor, up: Tensor, down: Tensor, policy: Policy) -> Tensor:
    routing = ops.route(ops.linear(x, router, policy=policy), 2, normalise=True, policy=policy)
    inner = ops.swiglu(
        ops.grouped_linear(x, up, routing.offsets, gather=routing, policy=policy), policy=policy
    )
    return ops.combine(
        ops.grouped_linear(inner, down, routing.offsets, policy=policy), routing, policy=policy
    )


def _weighted_softmax(logits: Tensor, policy: Policy) -> Tensor:
    return ops.route(logits, 3, normalise=False, policy=policy).weights


def _cross_entropy(reduction: str, hidden: Tensor, weight: Tensor, policy: Policy) -> Tensor:
    return ops.cross_entropy(
        hidden, weight, TARGETS, reduction=reduction, z_loss=1e-2, softcap=9.0, policy=policy
    )  # fmt: skip


def _log_probs(function: Callable[..., Any], *inputs: Tensor, policy: Policy) -> Any:
    return function(*inputs, KEPT, 0.7, policy=policy)


HIDDEN = normal(5, 16), normal(11, 16)
CALLS = {
    "rms_norm": Call(lambda x, w, policy: ops.rms_norm(x, w, 1e-5, policy=policy), (normal(5, 16), normal(16))),
    "add_rms_norm": Call(
        lambda x, r, w, policy: ops.add_rms_norm(x, r, w, 1e-5, policy=policy),
        (normal(5, 16), normal(5, 16) * 2.0, normal(16)),
    ),
    "swiglu": Call(ops.swiglu, (normal(5, 16),)),
    "linear": Call(ops.linear, (normal(5, 16), normal(8, 16), normal(8))),
    "linear_tp_invariant": Call(ops.linear_tp_invariant, (normal(5, 16), normal(8, 16), normal(8))),
    "linear_tp_partial": Call(
        lambda x, w, policy: ops.linear_tp_partial(x, w, degree=2, policy=policy), (normal(5, 16), normal(8, 16)),
    ),
    "linear_swiglu": Call(ops.linear_swiglu, (normal(5, 16) * 0.1, normal(8, 16), normal(8))),
    "qkv_heads": Call(
        lambda x, q, k, policy: ops.qkv_heads(
            x, 4, 2, ops.HeadNorms(q, k, 1e-5), ops.RopeAngles(POSITIONS, INV_FREQ), policy=policy
        ),
        (normal(5, 8, 8), normal(8), normal(8)),
    ),
    "rope": Call(
        lambda q, k, policy: ops.rope(q, k, ops.RopeAngles(POSITIONS, INV_FREQ), policy=policy),
        (normal(5, 4, 8), normal(5, 2, 8)),
    ),
    "mean cross_entropy": Call(partial(_cross_entropy, "mean"), HIDDEN),
    "sum of cross_entropy": Call(partial(_cross_entropy, "sum"), HIDDEN),
    "cross_entropy of rows": Call(partial(_cross_entropy, "none"), HIDDEN),
    "linear_log_probs": Call(partial(_log_probs, ops.linear_log_probs), HIDDEN),
    "linear_log_probs_and_entropy": Call(partial(_log_probs, ops.linear_log_probs_and_entropy), HIDDEN),
    "token_log_probs": Call(partial(_log_probs, ops.token_log_probs), (normal(5, 11),)),
    "token_log_probs_and_entropy": Call(partial(_log_probs, ops.token_log_probs_and_entropy), (normal(5, 11),)),
    "experts": Call(_experts, (normal(7, 6), normal(4, 6), normal(4, 16, 6), normal(4, 6, 8))),
    "route": Call(_weighted_softmax, (normal(5, 6),)),
}  # fmt: skip


def _loss_and_gradients(
    run: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = run(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
@pytest.mark.parametrize("name", CALLS)
def test_traced_code_computes_the_same(name: str, policy: Policy) -> None:
    call = CALLS[name]

    def loss(*inputs: Tensor) -> Tensor:
        out = call.function(*inputs, policy=policy)
        parts = out if isinstance(out, tuple) else (out,)
        return torch.stack([(p * p).sum() for p in parts]).sum()

    torch.compiler.reset()
    value, gradients = _loss_and_gradients(loss, call.inputs)
    traced, traced_gradients = _loss_and_gradients(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), call.inputs
    )
    assert torch.equal(value, traced)
    for a, b in zip(gradients, traced_gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [ops.token_log_probs, ops.token_log_probs_and_entropy])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
def test_log_probs_have_the_gradient_of_the_formula(function: Callable[..., Any], policy: Policy) -> None:
    def formula(logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits / 0.7, -1)
        chosen = log_p.gather(1, KEPT[:, None])[:, 0]
        if function is ops.token_log_probs:
            return chosen
        return torch.stack((chosen, -(log_p.exp() * log_p).sum(-1)))

    def ours(logits: Tensor) -> Tensor:
        out = function(logits, KEPT, 0.7, policy=policy)
        return torch.stack(out) if isinstance(out, tuple) else out

    logits = normal(5, 11)
    upstream = normal(*ours(logits).shape, grad=False)
    got, expected = (torch.autograd.grad(f(logits), logits, upstream)[0] for f in (ours, formula))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
def test_attention_of_whole_sequences_can_be_compiled(policy: Policy) -> None:
    batch = ops.TokenBatch.packed([3, 5])

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, batch, layer=0, scale=0.5, policy=policy).square().sum()

    torch.compiler.reset()
    inputs = (normal(8, 4, 8), normal(8, 2, 8), normal(8, 2, 8))
    _, gradients = _loss_and_gradients(loss, inputs)
    _, traced = _loss_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(gradients, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
@pytest.mark.parametrize("writer", ["attention", "rope_write_cache", "norm_rope_write_cache"])
def test_what_writes_to_a_cache_can_be_compiled(writer: str, policy: Policy) -> None:
    norms = ops.HeadNorms(normal(8, grad=False), normal(8, grad=False, seed=3), 1e-5)

    def step(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch) -> Tensor:
        if writer != "attention":
            angles = ops.RopeAngles(batch.positions, 0.1 ** torch.arange(4.0))
            if writer == "rope_write_cache":
                return ops.rope_write_cache(q, k, v, angles, batch, layer=0, policy=policy)
            q = ops.norm_rope_write_cache(q, k, v, norms, angles, batch, layer=0, policy=policy)
            return ops.attention(q, None, None, batch, layer=0, scale=0.5, policy=policy)
        return ops.attention(q, k, v, batch, layer=0, scale=0.5, policy=policy)

    torch.compiler.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        batch, k_cache, v_cache = packed_cache()
        with torch.no_grad():
            out = run(*(x.clone() for x in HEADS), replace(batch))
        results.append((out, k_cache, v_cache))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][1], K_CACHE)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
def test_a_draw_can_be_compiled(policy: Policy) -> None:
    def draw(logits: Tensor) -> Tensor:
        z = ops.adjust_logits(logits, SEATS, torch.arange(3), history=HISTORY, policy=policy)
        return ops.sample(z, SEATS, torch.arange(3), POSITIONS[:3], policy=policy)

    torch.compiler.reset()
    logits = normal(3, 11, grad=False)
    assert torch.equal(draw(logits), torch.compile(draw, fullgraph=True, backend="aot_eager")(logits))
