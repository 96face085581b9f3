"""The CUDA C++ grouped linear has the bits of Triton's, forward and backward, wherever experts begin and end."""

from __future__ import annotations

import pytest
import torch

from mainspring.ops.policy import Policy
from support.memory import in_poisoned_memory
from support.triton_kernels import (
    AVAILABLE,
    INTERPRETED,
    assert_same_bits,
)

pytestmark = [
    in_poisoned_memory,
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE or INTERPRETED, reason="Triton's compiled kernels are the other side"),
]

COUNTS = ([700, 0, 1, 128, 256, 2000, 63, 900], [0, 0, 640, 0], [129] * 12, [64, 65, 191, 193, 1000])
SIZES = [(1408, 1024), (1024, 520), (1000, 2104), (2816, 64)]


def _inputs(
    counts: list[int], n: int, k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)

    rows = sum(counts)
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0).to(torch.int32)
    weight = random(len(counts), n, k, scale=0.05)
    return random(rows, k, scale=1.0), weight, random(rows, n, scale=0.05), offsets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: f"{len(c)}experts")
def test_has_the_bits_of_triton(dtype: torch.dtype, n: int, k: int, counts: list[int]) -> None:
    from mainspring.ops.cuda import grouped_linear as cuda
    from mainspring.ops.triton import grouped_linear as triton

    x, weight, grad, offsets = _inputs(counts, n, k, dtype)
    assert_same_bits(cuda.grouped_linear(x, weight, offsets), triton.grouped_linear(x, weight, offsets))
    assert_same_bits(
        cuda.grouped_linear(grad, weight, offsets, transposed=True),
        triton.grouped_linear(grad, weight, offsets, transposed=True),
    )
    assert_same_bits(
        cuda.grouped_weight_gradient(x, grad, offsets), triton.grouped_weight_gradient(x, grad, offsets)
    )


def test_every_width_has_the_bits_of_triton() -> None:
    from mainspring.ops.cuda import grouped_linear as cuda
    from mainspring.ops.triton import grouped_linear as triton

    x, weight, grad, offsets = _inputs(COUNTS[0], 1408, 1024, torch.bfloat16)
    cases = (
        (cuda.FORWARD, x, weight, triton.grouped_linear(x, weight, offsets)),
        (cuda.INPUT_GRADIENT, grad, weight, triton.grouped_linear(grad, weight, offsets, transposed=True)),
        (cuda.WEIGHT_GRADIENT, grad, x, triton.grouped_weight_gradient(x, grad, offsets)),
    )
    for kind, a, b, expected in cases:
        for columns in cuda.COLUMNS[kind]:
            out = torch.full_like(expected, torch.nan)
            cuda.launch(kind, a, b, offsets, out, columns)
            assert_same_bits(out, expected)


def test_an_expert_does_not_see_its_neighbours_rows() -> None:
    """Infinities and NaN stay with their expert, also where a tile's rows run into the next one's."""
    from mainspring import ops

    counts = [100, 77, 130]
    x, weight, grad, offsets = _inputs(counts, 1024, 256, torch.bfloat16)
    x[100:177] = torch.nan
    grad[100:177] = torch.inf
    weight[1] = torch.nan
    for leaf in (x, weight):
        leaf.requires_grad_()
    ops.grouped_linear(x, weight, offsets, policy=Policy(backend="cuda")).backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad[:100].isfinite().all()
    assert x.grad[177:].isfinite().all()
    assert weight.grad[0].isfinite().all()
    assert weight.grad[2].isfinite().all()


def test_gathered_rows_weigh_in_the_weights_gradient_with_the_bits_of_triton() -> None:
    from mainspring.ops.cuda import grouped_linear as cuda
    from mainspring.ops.triton import grouped_linear as triton

    x, _, grad, offsets = _inputs(COUNTS[3], 1408, 1024, torch.bfloat16)
    index = torch.randint(0, 700, (x.shape[0],), device="cuda", dtype=torch.int32)
    got = cuda.grouped_weight_gradient(x[:700], grad, offsets, index)
    assert_same_bits(got, triton.grouped_weight_gradient(x[:700], grad, offsets, index))
