"""Routing by Triton's kernels is the reference's: the same experts, places and offsets, weights and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops.policy import Policy
from mainspring.ops.routing import Routing
from support.memory import in_poisoned_memory
from support.triton_kernels import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
    random_tensor,
)

pytestmark = [*needs_triton, in_poisoned_memory]

TRITON, REFERENCE = Policy(backend="triton"), Policy(backend="reference")
tokens = st.sampled_from([1, 2, 33, 70] if INTERPRETED else [1, 2, 33, 500, 4097])
shapes = st.sampled_from([(1, 1), (4, 2), (5, 5), (64, 6), (128, 8)])


def assert_same_routing(a: Routing, b: Routing) -> None:
    assert torch.equal(a.experts, b.experts)
    assert torch.equal(a.offsets, b.offsets)
    assert torch.equal(a.order, b.order)
    assert torch.equal(a.places, b.places)
    torch.testing.assert_close(a.weights, b.weights)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), t=tokens, shape=shapes, normalise=st.booleans(), seed=st.integers(0, 99)
)
def test_routes_as_the_reference(
    dtype: torch.dtype, t: int, shape: tuple[int, int], normalise: bool, seed: int
) -> None:
    logits = random_tensor(seed, t, shape[0], dtype=dtype, scale=3.0)
    logits[t // 2] = logits[t // 2].round()  # with ties
    got, expected = (
        ops.route(logits, shape[1], normalise=normalise, policy=policy) for policy in (TRITON, REFERENCE)
    )
    assert_same_routing(got, expected)
    assert got.order.dtype == got.places.dtype == got.offsets.dtype == torch.int32


def test_equal_logits_go_to_the_first_experts() -> None:
    for value in (0.0, -float("inf")):
        logits = torch.full((3, 7), value, device=DEVICE)
        assert ops.route(logits, 3, normalise=True, policy=TRITON).experts.tolist() == [[0, 1, 2]] * 3


def test_a_nan_is_chosen_and_shows_in_the_weights() -> None:
    logits = random_tensor(0, 4, 8)
    logits[1, 5] = float("nan")
    routing = ops.route(logits, 2, normalise=True, policy=TRITON)
    assert routing.experts[1, 0] == 5
    assert routing.weights.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("normalise", [False, True])
def test_a_token_is_routed_alike_in_every_batch(normalise: bool) -> None:
    logits = random_tensor(0, 70, 60, scale=3.0)
    whole = ops.route(logits, 4, normalise=normalise, policy=TRITON)
    for first, last in ((0, 1), (5, 38), (37, 70)):
        part = ops.route(logits[first:last], 4, normalise=normalise, policy=TRITON)
        assert torch.equal(part.experts, whole.experts[first:last])
        assert_same_bits(part.weights, whole.weights[first:last])


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_are_those_of_the_reference(normalise: bool) -> None:
    logits = random_tensor(0, 19, 12, scale=2.0)
    upstream = random_tensor(1, 19, 3)
    found = []
    for policy in (TRITON, REFERENCE):
        leaf = logits.clone().requires_grad_()
        ops.route(leaf, 3, normalise=normalise, policy=policy).weights.backward(upstream)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 1000, 2050])
def test_combines_as_the_reference(dtype: torch.dtype, size: int) -> None:
    routing = ops.route(
        random_tensor(0, 21, 6), 2, normalise=True, weights_dtype=torch.float32, policy=TRITON
    )
    rows, upstream = random_tensor(1, 42, size, dtype=dtype), random_tensor(2, 21, size, dtype=dtype)
    found = []
    for policy in (TRITON, REFERENCE):
        leaf, weights = rows.clone().requires_grad_(), routing.weights.clone().requires_grad_()
        mine = Routing(weights, routing.experts, routing.order, routing.places, routing.offsets)
        out = ops.combine(leaf, mine, policy=policy)
        out.backward(upstream)
        found.append((out.detach(), leaf.grad, weights.grad))
    for got, expected in zip(*found, strict=True):
        tolerance = 4 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * size**0.5)


def test_no_tokens() -> None:
    routing = ops.route(random_tensor(0, 0, 6), 2, normalise=True, policy=TRITON)
    assert routing.offsets.tolist() == [0] * 7
    assert ops.combine(random_tensor(0, 0, 16), routing, policy=TRITON).shape == (0, 16)


def test_bad_input_is_refused() -> None:
    logits = random_tensor(0, 3, 8)
    with pytest.raises(BackendError, match="top_k is 9"):
        ops.route(logits, 9, normalise=True, policy=TRITON)
    with pytest.raises(BackendError, match="1 to 1024 experts"):
        ops.route(random_tensor(0, 2, 1025), 2, normalise=True, policy=TRITON)
    routing = ops.route(logits, 2, normalise=True, policy=TRITON)
    with pytest.raises(BackendError, match="one for each slot"):
        ops.combine(random_tensor(0, 7, 16), routing, policy=TRITON)
