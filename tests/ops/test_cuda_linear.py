"""The CUDA C++ linear has the bits of Triton's: in every tile, for every M, eager and in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mainspring import ops
from mainspring.ops.policy import Policy
from support.cpu_kernels import assert_as_exact_as_torch
from support.triton_kernels import AVAILABLE, INTERPRETED, assert_same_bits, random_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE or INTERPRETED, reason="Triton's compiled kernels are the other side"),
]

TRITON, CUDA = Policy(backend="triton"), Policy(backend="cuda")
DTYPES = [torch.bfloat16, torch.float16]
# one chain and several chunks of K; sizes that fill no tile
SHAPES = [(4096, 1024), (1000, 2104), (512, 4096), (100, 8192), (40, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_m_has_the_bits_of_triton(dtype: torch.dtype, n: int, k: int) -> None:
    x, weight = random_tensor(0, 4096, k, dtype=dtype), random_tensor(1, n, k, dtype=dtype, scale=0.05)
    bias = random_tensor(2, n, dtype=dtype)
    whole = ops.linear(x, weight, bias, policy=TRITON)
    wide = ops.linear(x, weight, bias, out_dtype=torch.float32, policy=TRITON)
    for m in (1, 3, 8, 17, 64, 65, 128, 129, 200, 333, 512, 1024, 2048, 4096):
        assert_same_bits(ops.linear(x[:m], weight, bias, policy=CUDA), whole[:m])
        got = ops.linear(x[:m], weight, bias, out_dtype=torch.float32, policy=CUDA)
        assert_same_bits(got, wide[:m])
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_exact_as_torch(whole, F.linear(x, weight, bias), exact)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_tile_has_the_bits_of_triton(n: int, k: int) -> None:
    from mainspring.ops.cuda.linear import TILES, launch
    from mainspring.ops.triton.linear import k_chunk

    weight = random_tensor(1, n, k, dtype=torch.bfloat16, scale=0.05)
    for m in (1, 40, 130):
        x = random_tensor(0, m, k, dtype=torch.bfloat16)
        expected = ops.linear(x, weight, policy=TRITON)
        for tile in TILES:
            if k_chunk(n, k) < k and (k_chunk(n, k) % (64 * tile.panels) or tile.groups > 2):
                continue
            for variant in (tile, replace(tile, stages=2, prefetch=2), replace(tile, prefetch=None)):
                out = torch.full_like(expected, torch.nan)
                launch(x, weight, None, out, k_chunk(n, k), variant)
                assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "k"), [(3072, 1024), (1000, 576), (36, 64)])
def test_a_gated_product_has_the_bits_of_its_two_operations(dtype: torch.dtype, inner: int, k: int) -> None:
    from mainspring.ops.cuda.linear import GATED_TILES, launch
    from mainspring.ops.linear_swiglu import two_operations

    weight = random_tensor(1, 2 * inner, k, dtype=dtype, scale=0.3)
    for m in (1, 40, 130, 200, 256):
        x = random_tensor(m, m, k, dtype=dtype)
        for bias in (None, random_tensor(2, 2 * inner, dtype=dtype)):
            expected = two_operations(x, weight, bias, TRITON)
            assert_same_bits(ops.linear_swiglu(x, weight, bias, policy=CUDA), expected)
            for tile in GATED_TILES:
                out = torch.full_like(expected, torch.nan)
                launch(x, weight, bias, out, k, tile, gated=True)
                assert_same_bits(out, expected)


def test_a_gated_product_of_extreme_rows_and_of_strided_ones() -> None:
    from mainspring.ops.linear_swiglu import two_operations

    weight = random_tensor(1, 2 * 512, 256, dtype=torch.bfloat16, scale=0.3)
    wide = random_tensor(0, 20, 512, dtype=torch.bfloat16)
    x = wide[:, 128:384]
    x[:5] *= 1000  # gates beyond exp's range on both sides
    x[5], x[6, 3] = torch.inf, torch.nan
    out, expected = ops.linear_swiglu(x, weight, policy=CUDA), two_operations(x, weight, None, TRITON)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected[:5].isfinite().any()
    assert_same_bits(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def test_strided_rows() -> None:
    wide = random_tensor(0, 20, 256, dtype=torch.bfloat16)
    weight = random_tensor(1, 40, 64, dtype=torch.bfloat16)
    for first in (0, 1, 8):
        view = wide[:, first : first + 64]
        assert_same_bits(
            ops.linear(view, weight, policy=CUDA), ops.linear(view.contiguous(), weight, policy=CUDA)
        )


@pytest.mark.parametrize(("n", "k"), [(1024, 3072), (256, 8192)])
def test_a_graph_of_dependent_calls_replays_what_eager_calls_give(n: int, k: int) -> None:
    """Kernels of a graph may be set up while the ones before them run: results must not come early."""
    down, up = (
        random_tensor(seed, *shape, dtype=torch.bfloat16, scale=0.02)
        for seed, shape in ((0, (n, k)), (1, (k, n)))
    )
    for m in (1, 16, 100):
        x = random_tensor(2, m, k, dtype=torch.bfloat16)

        def chain(x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = ops.linear(ops.linear(x, down, policy=CUDA), up, policy=CUDA)
            return x

        expected = chain(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(x)
        for seed in (3, 4):
            x.copy_(random_tensor(seed, m, k, dtype=torch.bfloat16))
            graph.replay()
            assert_same_bits(captured, chain(x))
        assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (97, 512), (2048, 3072)])
def test_segments_have_the_bits_of_triton(dtype: torch.dtype, n: int, k: int) -> None:
    x, weight = random_tensor(0, 2000, k, dtype=dtype), random_tensor(1, n, k, dtype=dtype)
    bias = random_tensor(2, n, dtype=dtype)
    whole = ops.linear_tp_invariant(x, weight, bias, policy=TRITON)
    for m in (1, 17, 64, 300, 2000):
        assert_same_bits(ops.linear_tp_invariant(x[:m], weight, bias, policy=CUDA), whole[:m])
        for degree in (2, 4, 8):
            parts = list(zip(x[:m].chunk(degree, 1), weight.chunk(degree, 1), strict=True))
            partials = [
                ops.linear_tp_partial(a.contiguous(), b.contiguous(), degree=degree, policy=CUDA)
                for a, b in parts
            ]
            assert_same_bits(ops.join_tp_partials(partials, bias, dtype), whole[:m])


def test_segments_in_a_cluster_and_in_a_block_have_the_same_bits() -> None:
    from mainspring.ops.cuda.linear import SEGMENTED, TILES, launch

    x = random_tensor(0, 200, 1024, dtype=torch.bfloat16)
    weight = random_tensor(1, 1000, 1024, dtype=torch.bfloat16)
    for segments in (2, 4, 8):
        chunk = 1024 // segments
        outs = []
        for tile in (
            SEGMENTED,
            *(replace(t, blocks=2) for t in TILES if t.groups < 3 and chunk % (64 * t.panels) == 0),
        ):
            outs.append(torch.full((200, 1000), torch.nan, device="cuda"))
            launch(x, weight, None, outs[-1], chunk, tile, tree=True)
        for out in outs[1:]:
            assert_same_bits(out, outs[0])
