"""What the tests of the CUDA flash attention share: inputs, the error rule, and the cases that both passes hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring.ops.cuda.compiler import find_nvcc

DTYPES = (torch.bfloat16, torch.float16)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or find_nvcc() is None, reason="needs a GPU and nvcc"),
]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def ends(lengths: list[int]) -> Tensor:
    return ints([0, *itertools.accumulate(lengths)])


def assert_twice_as_exact(got: Tensor, low: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Errors at most twice those of `low`, the formula in got's dtype, and so many roundings of the largest value."""
    if exact.numel() == 0:
        return
    rounding = roundings * torch.finfo(got.dtype).eps * max(1.0, exact.abs().max().item())
    bound = 2 * (low.float() - exact).abs().max().item() + rounding
    assert (got.float() - exact).abs().max().item() <= bound  # false for NaN


class FlashCases:
    """Cases of both passes. check(lengths of queries, lengths of keys, ...): computes one and compares it."""

    check: Callable[..., None]
    capped_magnitude: float  # of queries and keys, where scores are capped
    large_magnitude: float  # where scores are large

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
    def test_head_sizes(self, d: int, dtype: torch.dtype, causal: bool) -> None:
        torch.manual_seed(d)
        self.check([321, 1, 64, 190], [321, 1, 64, 190], d=d, dtype=dtype, causal=causal)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_long_sequences(self, d: int, causal: bool) -> None:
        self.check([2048, 1000, 77], [2048, 1000, 77], heads=8, kv_heads=8, d=d, causal=causal)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_other_lengths_of_keys(self, d: int, causal: bool) -> None:
        self.check([1, 100, 0, 300, 5, 129], [513, 700, 40, 300, 0, 128], d=d, causal=causal)
        self.check([300, 40], [77, 3], d=d, causal=causal)  # queries before the first key see none

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("window", [1, 17, 128, 500])
    @pytest.mark.parametrize("d", [64, 128])
    def test_sliding_window(self, d: int, window: int, causal: bool) -> None:
        self.check([700, 33, 1], [700, 900, 64], d=d, window=window, causal=causal)

    @pytest.mark.parametrize("d", [64, 128])
    def test_softcap(self, d: int) -> None:
        options: dict[str, Any] = {"d": d, "softcap": 20.0, "magnitude": self.capped_magnitude}
        self.check([300, 65], [300, 200], **options)
        self.check([300, 65], [300, 200], **options, causal=False, window=100)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (12, 4), (7, 1)])
    def test_head_groups(self, heads: int, kv_heads: int) -> None:
        self.check([260, 70], [260, 70], heads=heads, kv_heads=kv_heads)

    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_large_scores(self, d: int, dtype: torch.dtype) -> None:
        self.check([400], [400], d=d, dtype=dtype, magnitude=self.large_magnitude)
        self.check([400], [400], d=d, dtype=dtype, magnitude=self.large_magnitude, causal=False)
