"""CUDA flash attention's gradients against autograd through the formula in fp32: no more than twice the error of the
formula in 16 bits."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import flash_reference
from mainspring.ops.cuda import compiler, flash_backward
from mainspring.ops.cuda.compiler import find_nvcc
from mainspring.ops.cuda.flash_backward import flash_attention_backward

DTYPES = (torch.bfloat16, torch.float16)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or find_nvcc() is None, reason="needs a GPU and nvcc"),
]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def check(
    q_lengths: list[int],
    k_lengths: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    magnitude: float = 1.0,
    deterministic: bool = False,
    strided: bool = False,
    unused: int = 0,
) -> None:
    """unused: so many tokens of NaN lie behind the last sequence."""
    cu_q, cu_k = ends(q_lengths), ends(k_lengths)
    tokens, keys = sum(q_lengths), sum(k_lengths)
    if strided:
        fused = random(tokens + unused, heads + 2 * kv_heads, d, dtype=dtype, scale=magnitude)
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    else:
        q = random(tokens + unused, heads, d, dtype=dtype, scale=magnitude)
        k = random(keys + unused, kv_heads, d, dtype=dtype, scale=magnitude)
        v = random(keys + unused, kv_heads, d, dtype=dtype)
    dout = random(tokens + unused, heads, d, dtype=dtype)
    for tensor, used in ((q, tokens), (k, keys), (v, keys), (dout, tokens)):
        tensor[used:] = float("nan")
    scale = d**-0.5

    def gradients(precision: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        leaves = [
            x[:n].detach().to(precision).requires_grad_() for x, n in ((q, tokens), (k, keys), (v, keys))
        ]
        out, lse = flash_reference.forward(*leaves, cu_q, cu_k, scale, causal, window, softcap)
        return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, dout[:tokens].to(precision))

    exact_out, exact_lse, exact = gradients(torch.float32)
    _, _, same = gradients(dtype)
    out, lse = (
        torch.full_like(dout, float("nan")),
        torch.full((heads, tokens + unused), float("nan"), device="cuda"),
    )
    out[:tokens], lse[:, :tokens] = exact_out.to(dtype), exact_lse
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN: what is not written shows
    try:
        results = [
            flash_attention_backward(
                dout, q, k, v, out, lse, cu_q, cu_k, max_q=max(q_lengths), max_k=max(k_lengths), scale=scale,
                causal=causal, window=window, softcap=softcap, deterministic=deterministic,
            )
            for _ in range(2 if deterministic else 1)
        ]  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))
    for got, wanted, low in zip(results[0], exact, same, strict=True):
        used = len(wanted)
        assert got.dtype is dtype
        assert not got[used:].any()
        if used == 0:
            continue
        rounding = 2 * torch.finfo(dtype).eps * max(1.0, wanted.abs().max().item())
        bound = 2 * (low.float() - wanted).abs().max().item() + rounding
        assert (got[:used].float() - wanted).abs().max().item() <= bound  # false for NaN


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
    def test_head_sizes(self, d: int, dtype: torch.dtype, causal: bool) -> None:
        torch.manual_seed(d)
        check([321, 1, 64, 190], [321, 1, 64, 190], d=d, dtype=dtype, causal=causal)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_long_sequences(self, d: int, causal: bool) -> None:
        check([2048, 1000, 77], [2048, 1000, 77], heads=8, kv_heads=8, d=d, causal=causal)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_other_lengths_of_keys(self, d: int, causal: bool) -> None:
        check([1, 100, 0, 300, 5, 129], [513, 700, 40, 300, 0, 128], d=d, causal=causal)
        check([300, 40], [77, 3], d=d, causal=causal)  # queries before the first key see none

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("window", [1, 17, 128, 500])
    @pytest.mark.parametrize("d", [64, 128])
    def test_sliding_window(self, d: int, window: int, causal: bool) -> None:
        check([700, 33, 1], [700, 900, 64], d=d, window=window, causal=causal)

    @pytest.mark.parametrize("d", [64, 128])
    def test_softcap(self, d: int) -> None:
        check([300, 65], [300, 200], d=d, softcap=20.0, magnitude=2.0)
        check([300, 65], [300, 200], d=d, softcap=20.0, magnitude=2.0, causal=False, window=100)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (12, 4), (7, 1)])
    def test_head_groups(self, heads: int, kv_heads: int) -> None:
        check([260, 70], [260, 70], heads=heads, kv_heads=kv_heads)

    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_large_scores(self, d: int, dtype: torch.dtype) -> None:
        check([400], [400], d=d, dtype=dtype, magnitude=4.0)
        check([400], [400], d=d, dtype=dtype, magnitude=4.0, causal=False)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("d", [64, 128, 256])
    def test_deterministic(self, d: int, causal: bool) -> None:
        check([1500, 40], [1500, 333], d=d, causal=causal, deterministic=True)
        check([1500, 40], [1500, 333], d=d, causal=causal, window=300, deterministic=True)

    def test_tokens_of_a_fused_projection(self) -> None:
        check([300, 20], [300, 20], strided=True)

    @pytest.mark.parametrize("d", [64, 128])
    def test_what_lies_behind_the_last_sequence_is_not_seen(self, d: int) -> None:
        check([200, 100], [150, 130], d=d, unused=77)


def arguments(
    dtype: torch.dtype = torch.bfloat16, d: int = 64, heads: int = 2, kv_heads: int = 1
) -> dict[str, Tensor]:
    q, k = torch.zeros(4, heads, d, dtype=dtype), torch.zeros(4, kv_heads, d, dtype=dtype)
    ends_of_one = torch.tensor([0, 4], dtype=torch.int32)
    return {
        "dout": q, "q": q, "k": k, "v": k, "out": q, "lse": torch.zeros(heads, 4), "cu_q": ends_of_one,
        "cu_k": ends_of_one,
    }  # fmt: skip


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize(("d", "causal"), [(128, True), (64, False)])
def test_compiles_without_spills(d: int, causal: bool) -> None:
    tile = flash_backward.choose_tile(d, deterministic=False)
    defines = flash_backward.defines(torch.bfloat16, d, causal, False, False, False, tile)
    report = compiler.build(flash_backward.SOURCE, defines).with_suffix(".log").read_text()
    assert set(re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)) == {("0", "0")}
    assert "C75" not in report  # wgmma serialised (C7510 and its like), setmaxnreg ignored (C7508)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "runs on CUDA devices, not on cpu"),
            (arguments(dtype=torch.float32), "takes bfloat16 and float16, not torch.float32"),
            (arguments(d=80), r"head sizes \(64, 96, 128, 192, 256\), not 80"),
            (arguments(heads=3, kv_heads=2), "2 key heads do not divide 3 query heads"),
            ({"lse": torch.zeros(4, 2)}, r"lse is \[4, 2\], not \[2, 4\]"),
            ({"lse": torch.zeros(2, 4, dtype=torch.float64)}, "lse must be contiguous and torch.float32"),
            (
                {"dout": torch.zeros(4, 2, 64, dtype=torch.float16)},
                "dout is torch.float16, q is torch.bfloat16",
            ),
            ({"v": torch.zeros(3, 1, 64, dtype=torch.bfloat16)}, r"v is \[3, 1, 64\], not \[4, 1, 64\]"),
            ({"cu_k": torch.tensor([0, 4])}, "cu_k must be contiguous and torch.int32"),
            (
                {"q": torch.zeros(2, 4, 64, dtype=torch.bfloat16).transpose(0, 1)},
                "q's heads must be contiguous",
            ),
        ],
    )
    def test_says_what_is_wrong(self, changes: dict[str, Tensor], message: str) -> None:
        with pytest.raises(BackendError, match=message):
            flash_attention_backward(**{**arguments(), **changes}, max_q=4, max_k=4, scale=1.0)

    def test_scale_must_be_positive(self) -> None:
        with pytest.raises(BackendError, match="positive scale, not -1"):
            flash_attention_backward(**arguments(), max_q=4, max_k=4, scale=-1.0)
