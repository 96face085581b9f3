"""Triton's grouped linear: one launch, the bits of `linear` for each expert's rows, gradients of the formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops.policy import Policy
from support.cpu_kernels import assert_as_exact_as_torch
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
count = st.sampled_from([0, 1, 5, 64, 70] if INTERPRETED else [0, 1, 5, 64, 127, 128, 129, 300, 1000])
counts_of = st.lists(count, min_size=1, max_size=4 if INTERPRETED else 20)
sizes = st.sampled_from([(8, 8), (40, 72), (97, 48), (24, 2100)])


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).to(torch.int32)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(dtype=st.sampled_from(DTYPES), counts=counts_of, size=sizes, seed=st.integers(0, 99))
def test_rows_have_the_bits_of_linear(
    dtype: torch.dtype, counts: list[int], size: tuple[int, int], seed: int
) -> None:
    from mainspring.ops.triton.grouped_linear import grouped_linear
    from mainspring.ops.triton.linear import Tile, linear

    n, k = size
    x, weight = (
        random_tensor(seed, sum(counts), k, dtype=dtype),
        random_tensor(seed + 1, len(counts), n, k, dtype=dtype),
    )
    # One tile for both: on a GPU it changes no bit, but numpy, which multiplies in the interpreter, looks at it.
    tile = None if dtype is torch.float32 else Tile(64, 64, 64, 4, 4)
    got = grouped_linear(x, weight, offsets_of(counts), tile=tile)
    pieces = [linear(rows, weight[e], tile=tile) for e, rows in enumerate(x.split(counts)) if len(rows)]
    assert_same_bits(got, torch.cat([x.new_empty(0, n), *pieces]))
    by_offsets, by_counts = (
        ops.grouped_linear(x, weight, c, policy=TRITON) for c in (offsets_of(counts), counts)
    )
    assert_same_bits(by_offsets, by_counts)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1408, 1024), (512, 2048), (2816, 520)])
def test_every_tile_has_the_bits_of_linear(dtype: torch.dtype, n: int, k: int) -> None:
    from mainspring.ops.triton.grouped_linear import SMALL, SQUARE, WIDE, grouped_linear

    counts = [700, 0, 1, 128, 256, 2000, 63, 900]
    x = random_tensor(0, sum(counts), k, dtype=dtype)
    weight = random_tensor(1, 8, n, k, dtype=dtype, scale=0.05)
    expected = torch.cat([ops.linear(rows, weight[e]) for e, rows in enumerate(x.split(counts)) if len(rows)])
    for tile in (SMALL, SQUARE, WIDE):
        assert_same_bits(grouped_linear(x, weight, offsets_of(counts), tile=tile), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gathered", [False, True])
def test_gradients_are_as_exact_as_those_of_torch(dtype: torch.dtype, gathered: bool) -> None:
    t, experts, top_k, n, k = (40, 5, 2, 72, 40) if INTERPRETED else (700, 9, 3, 200, 328)
    logits = random_tensor(0, t, experts)
    logits[:, 1] -= 100.0  # an expert without rows
    routing = ops.route(logits, top_k, normalise=True, policy=TRITON)
    x = random_tensor(1, t if gathered else t * top_k, k, dtype=dtype)
    weight = random_tensor(2, experts, n, k, dtype=dtype)
    upstream = random_tensor(3, t * top_k, n, dtype=dtype)
    found = []
    for policy, precision in ((TRITON, dtype), (REFERENCE, dtype), (REFERENCE, torch.float64)):
        leaf, leaf_weight = (v.to(precision, copy=True).requires_grad_() for v in (x, weight))
        gather = routing if gathered else None
        out = ops.grouped_linear(leaf, leaf_weight, routing.offsets, gather=gather, policy=policy)
        out.backward(upstream.to(precision))
        found.append((out.detach(), leaf.grad, leaf_weight.grad))
    for got, peer, exact in zip(*found, strict=True):
        assert got is not None
        assert peer is not None
        assert exact is not None
        assert_as_exact_as_torch(got, peer, exact, roundings=2 + t**0.5 if dtype is torch.float32 else 2)
    assert not found[0][2][1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_rows_on_the_way(dtype: torch.dtype) -> None:
    x, weight = random_tensor(0, 30, 48, dtype=dtype), random_tensor(1, 4, 40, 48, dtype=dtype)
    routing = ops.route(random_tensor(2, 30, 4), 2, normalise=True, policy=TRITON)
    got = ops.grouped_linear(x, weight, routing.offsets, gather=routing, policy=TRITON)
    assert_same_bits(got, ops.grouped_linear(x[routing.tokens], weight, routing.offsets, policy=TRITON))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_rows(dtype: torch.dtype) -> None:
    wide, weight = random_tensor(0, 20, 100, dtype=dtype), random_tensor(1, 2, 40, 64, dtype=dtype)
    for first in (0, 1, 8):
        view = wide[:, first : first + 64]
        got = ops.grouped_linear(view, weight, [7, 13], policy=TRITON)
        assert_same_bits(got, ops.grouped_linear(view.contiguous(), weight, [7, 13], policy=TRITON))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")
def test_one_graph_serves_every_routing() -> None:
    """Captured once, replayed over other logits: nothing in the layer looks at the counts."""
    x, weight = (
        random_tensor(0, 300, 64, dtype=torch.bfloat16),
        random_tensor(1, 8, 128, 64, dtype=torch.bfloat16),
    )
    logits = random_tensor(2, 300, 8)

    def layer() -> torch.Tensor:
        routing = ops.route(logits, 2, normalise=True)
        return ops.combine(ops.grouped_linear(x, weight, routing.offsets, gather=routing), routing)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for seed in (3, 4):
        logits.copy_(random_tensor(seed, 300, 8))
        graph.replay()
        assert_same_bits(captured, layer())


def test_bad_input_is_refused() -> None:
    x, weight = random_tensor(0, 6, 8), random_tensor(1, 2, 5, 8)
    for counts in ([6], [3, 2], [7, -1]):
        with pytest.raises(BackendError, match="counts must be 2 numbers of 6 rows"):
            ops.grouped_linear(x, weight, counts, policy=TRITON)
    with pytest.raises(BackendError, match="int32"):
        ops.grouped_linear(x, weight, torch.tensor([0, 3, 6], device=DEVICE), policy=TRITON)
    with pytest.raises(BackendError, match="does not fit"):
        ops.grouped_linear(x, random_tensor(1, 2, 5, 9), [3, 3], policy=TRITON)
    assert [b - a for a, b in pairwise(offsets_of([3, 3]).tolist())] == [3, 3]
