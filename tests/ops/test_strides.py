"""Tensors that lie otherwise in memory: the same numbers, or a typed refusal, never others and never a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops import Policy, RopeAngles, TokenBatch

POLICIES = [Policy("lockstep"), Policy("lockstep", "reference"), Policy("fast")]
BATCH = TokenBatch.packed([3, 5])
TARGETS = torch.arange(8)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Call:
    """A function of tensors; the keyword `policy` is added."""

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]


CALLS = {
    "linear": Call(ops.linear, (normal(8, 16), normal(24, 16), normal(24))),
    "linear_swiglu": Call(ops.linear_swiglu, (normal(8, 16), normal(24, 16), normal(24))),
    "linear_tp_invariant": Call(ops.linear_tp_invariant, (normal(8, 16), normal(24, 16), normal(24))),
    "rms_norm": Call(lambda x, w, policy: ops.rms_norm(x, w, 1e-5, policy=policy), (normal(8, 16), normal(16))),
    "add_rms_norm": Call(
        lambda x, r, w, policy: ops.add_rms_norm(x, r, w, 1e-5, policy=policy)[0],
        (normal(8, 16), normal(8, 16), normal(16)),
    ),
    "swiglu": Call(ops.swiglu, (normal(8, 16),)),
    "rope": Call(
        lambda q, k, policy: ops.rope(q, k, RopeAngles(torch.arange(8), normal(4)), policy=policy)[1],
        (normal(8, 4, 8), normal(8, 2, 8)),
    ),
    "attention": Call(
        lambda q, k, v, policy: ops.attention(q, k, v, BATCH, layer=0, scale=0.3, policy=policy),
        (normal(8, 4, 8), normal(8, 2, 8), normal(8, 2, 8)),
    ),
    "grouped_linear": Call(
        lambda x, w, policy: ops.grouped_linear(x, w, [3, 5], policy=policy), (normal(8, 16), normal(2, 24, 16))
    ),
    "token_log_probs": Call(
        lambda z, policy: ops.token_log_probs_and_entropy(z, TARGETS, policy=policy)[0], (normal(8, 16),)
    ),
    "linear_log_probs": Call(
        lambda h, w, policy: ops.linear_log_probs(h, w, TARGETS, policy=policy), (normal(8, 16), normal(9, 16))
    ),
    "cross_entropy": Call(
        lambda h, w, policy: ops.cross_entropy(h, w, TARGETS, reduction="none", policy=policy),
        (normal(8, 16), normal(9, 16)),
    ),
    "route": Call(
        lambda x, policy: ops.route(x, 2, normalise=True, policy=policy).weights, (normal(8, 6),)
    ),
}  # fmt: skip


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values: every second element of a row, columns before rows, in a larger tensor, off its alignment."""
    yield "every second", torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    shifted = torch.full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
    yield "shifted", shifted.copy_(x)
    if x.dim() > 1:
        yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
        larger = torch.full([n + 3 for n in x.shape], torch.nan)[tuple(slice(n) for n in x.shape)]
        yield "padded", larger.copy_(x)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.numerics}-{p.backend}")
@pytest.mark.parametrize("name", CALLS)
def test_the_same_numbers_or_a_refusal(name: str, policy: Policy) -> None:
    call, served = CALLS[name], 0
    refusals: list[str] = []
    expected = call.function(*(x.clone() for x in call.inputs), policy=policy)
    for i, original in enumerate(call.inputs):
        for layout, x in layouts(original):
            inputs = [other.clone() for other in call.inputs]
            inputs[i] = x
            try:
                found = call.function(*inputs, policy=policy)
            except BackendError as error:
                refusals.append(str(error))
                continue
            torch.testing.assert_close(found, expected, msg=f"{layout} argument {i}")
            served += 1
    assert all("contiguous" in refusal or "[M, 2 I]" in refusal for refusal in refusals)
    assert served  # what is merely off its alignment, at least
