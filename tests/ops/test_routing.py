"""The reference of routing against its formula, and against what it says of ties, orders and places."""

from __future__ import annotations

import pytest
import torch

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops.policy import Policy
from mainspring.ops.routing import Routing

REFERENCE = Policy(backend="reference")


def test_sorts_the_slots_by_expert_and_keeps_their_order() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0], [0.0, 0.0, 0.0]])
    routing = ops.route(logits, 2, normalise=True, policy=REFERENCE)
    assert routing.experts.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert routing.offsets.tolist() == [0, 2, 4, 6]
    assert routing.order.tolist() == [2, 4, 0, 5, 1, 3]
    assert routing.places.tolist() == [[2, 4], [0, 5], [1, 3]]
    assert routing.tokens.tolist() == [1, 2, 0, 2, 0, 1]
    assert routing.places.flatten()[routing.order.long()].tolist() == list(range(6))


def test_weights_are_shares_of_all_or_of_the_chosen() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    share = torch.softmax(logits, -1)
    top = share.topk(3).values
    torch.testing.assert_close(ops.route(logits, 3, normalise=False, policy=REFERENCE).weights, top)
    normalised = ops.route(logits, 3, normalise=True, policy=REFERENCE).weights
    torch.testing.assert_close(normalised, top / top.sum(-1, keepdim=True))
    torch.testing.assert_close(normalised, torch.softmax(logits.topk(3).values, -1))


@pytest.mark.parametrize("normalise", [False, True])
def test_gradients_are_those_of_finite_differences(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    rows = torch.randn(8, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def layer(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ops.combine(
            rows, ops.route(logits, 2, normalise=normalise, policy=REFERENCE), policy=REFERENCE
        )

    assert torch.autograd.gradcheck(layer, (logits, rows))


def test_combines_in_the_order_of_the_slots() -> None:
    places = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    nothing = torch.empty(0, dtype=torch.int32)
    routing = Routing(weights, nothing, torch.tensor([1, 2, 0, 3], dtype=torch.int32), places, nothing)
    rows = torch.tensor([[4.0], [8.0], [16.0], [32.0]])
    assert ops.combine(rows, routing, policy=REFERENCE).tolist() == [[9.0], [72.0]]


def test_bad_input_is_refused() -> None:
    with pytest.raises(BackendError, match="top_k is 0"):
        ops.route(torch.zeros(2, 3), 0, normalise=True)
    with pytest.raises(BackendError, match="one for each slot"):
        ops.combine(torch.zeros(5, 3), ops.route(torch.zeros(2, 3), 2, normalise=True, policy=REFERENCE))
