"""Products with quantised weights: exact in the codes, each row's bits its own, values as `gguf` reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import BackendError
from mainspring.ops import Policy
from mainspring.ops.cpu.quantised_linear import BLOCK, pack, quantised_linear
from mainspring.ops.linear import linear
from mainspring.ops.quantised_linear import QUANTISED_TYPES, BlockRows, QuantisedWeight
from support.cpu_kernels import assert_same_bits, random_tensor, requires_kernels, threads
from support.memory import in_poisoned_memory

pytestmark = [requires_kernels, in_poisoned_memory]

kinds = st.sampled_from(QUANTISED_TYPES)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**31)


def quantised(kind: str, seed: int, n: int, k: int) -> BlockRows:
    values = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return BlockRows(kind, torch.from_numpy(quantize(values, GGMLQuantizationType[kind])))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as the kernel sees it, in float64: int8 codes times max / 127, a block of 32 at a time."""
    blocks = x.float().reshape(x.shape[0], -1, BLOCK)
    d = blocks.abs().amax(-1, keepdim=True) / 127.0
    codes = torch.round(blocks * torch.where(d > 0, 1.0 / d, 0.0)).clamp(-127, 127)
    return (codes.double() * d.double()).reshape(x.shape)


@pytest.mark.parametrize("kind", QUANTISED_TYPES)
def test_the_values_of_blocks_are_those_that_gguf_reads(kind: str) -> None:
    rows = quantised(kind, 1, 7, 96)
    want = dequantize(rows.blocks.numpy(), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(rows.expanded().numpy(), want)
    assert rows.shape == (7, 96)
    weight = QuantisedWeight([rows], torch.float32)
    np.testing.assert_array_equal(weight.embed(torch.tensor([5, 0, 5])).numpy(), want[[5, 0, 5]])


@settings(deadline=None, max_examples=60)
@given(
    kinds,
    seeds,
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 6),
    dtypes,
    st.booleans(),
    st.booleans(),
)
def test_is_the_product_of_the_rounded_values(
    kind: str, seed: int, m: int, n: int, blocks: int, dtype: torch.dtype, with_bias: bool, wide: bool
) -> None:
    rows = quantised(kind, seed, n, blocks * BLOCK)
    x = random_tensor(seed, m, blocks * BLOCK, dtype=dtype)
    bias = random_tensor(seed + 1, n, dtype=dtype) if with_bias else None
    out = linear(x, QuantisedWeight([rows], dtype), bias, out_dtype=torch.float32 if wide else None)
    exact = rounded(x) @ rows.expanded().double().T + (0.0 if bias is None else bias.double())
    assert out.dtype is (torch.float32 if wide else dtype)
    size = float((rounded(x).abs() @ rows.expanded().double().abs().T).max()) + 1.0
    step = 2.0**-8 if out.dtype is torch.bfloat16 else 2.0**-24
    torch.testing.assert_close(out.double(), exact, rtol=step, atol=size * blocks * 2.0**-22)


@settings(deadline=None, max_examples=30)
@given(kinds, seeds, st.integers(2, 80), st.integers(1, 100), st.integers(1, 8), st.data())
def test_a_rows_bits_are_its_own(
    kind: str, seed: int, m: int, n: int, blocks: int, data: st.DataObject
) -> None:
    weight = QuantisedWeight([quantised(kind, seed, n, blocks * BLOCK)], torch.bfloat16)
    x = random_tensor(seed, m, blocks * BLOCK, dtype=torch.bfloat16)
    out = linear(x, weight)
    first = data.draw(st.integers(0, m - 1))
    count = data.draw(st.integers(1, m - first))
    assert_same_bits(linear(x[first : first + count], weight), out[first : first + count])
    with threads(3):
        assert_same_bits(linear(x, weight), out)


def test_parts_of_several_types_lie_below_each_other() -> None:
    parts = [quantised("Q4_1", 1, 32, 64), quantised("Q4_1", 2, 24, 64), quantised("Q4_1", 3, 8, 64)]
    parts.append(quantised("Q8_0", 4, 10, 64))
    weight = QuantisedWeight(parts, torch.float32)
    x, bias = random_tensor(5, 9, 64), random_tensor(6, 74)
    want = torch.cat([linear(x, QuantisedWeight([part], torch.float32)) for part in parts], 1) + bias
    assert_same_bits(linear(x, weight, bias), want)
    assert weight.shape == (74, 64)
    assert weight.numel() == 74 * 64


def test_the_reference_expands_the_weights_and_the_kernel_is_near_it() -> None:
    weight = QuantisedWeight([quantised("Q8_0", 1, 40, 256)], torch.float32)
    x = random_tensor(2, 12, 256)
    plain = linear(x, weight, policy=Policy(backend="reference"))
    torch.testing.assert_close(plain, x @ weight.expanded().T, rtol=1e-5, atol=1e-4)
    # Rounding x to 127 steps of each block's largest: an error of about 1 / (127 sqrt(12)) of it, at random.
    error = (linear(x, weight) - plain).double().pow(2).mean().sqrt() / plain.double().pow(2).mean().sqrt()
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38])
def test_rows_of_zeros_and_extremes_stay_finite(value: float) -> None:
    weight = QuantisedWeight([quantised("Q4_1", 1, 16, 64)], torch.float32)
    x = torch.full((2, 64), value)
    x[1] = 1.0
    out = linear(x, weight)
    assert bool(torch.isfinite(out[1]).all())
    assert value > 1 or bool((out[0] == 0).all())


def test_a_backward_pass_goes_through_the_reference() -> None:
    weight = QuantisedWeight([quantised("Q4_0", 1, 16, 64)], torch.float32)
    x = random_tensor(2, 3, 64).requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.expanded().sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    rows = quantised("Q8_0", 1, 16, 64)
    weight = QuantisedWeight([rows], torch.float32)
    with pytest.raises(BackendError, match="does not fit a weight"):
        linear(random_tensor(0, 2, 32), weight)
    with pytest.raises(BackendError, match="one width and of known types"):
        QuantisedWeight([rows, quantised("Q8_0", 1, 16, 96)], torch.float32)
    with pytest.raises(BackendError, match="whole blocks"):
        pack("Q8_0", rows.blocks[:, :-1].contiguous())
    x, out = random_tensor(0, 2, 64), torch.empty(2, 16)
    packed = pack("Q8_0", rows.blocks)
    with pytest.raises(BackendError, match="does not fit 15 rows"):
        quantised_linear(x, "Q8_0", packed[:-1], None, out[:, :15], 15)
    with pytest.raises(BackendError, match="bias must be"):
        quantised_linear(x, "Q8_0", packed, torch.empty(15), out, 16)
    with pytest.raises(BackendError, match="contiguous along rows"):
        quantised_linear(x, "Q8_0", packed, None, torch.empty(16, 2).T, 16)
