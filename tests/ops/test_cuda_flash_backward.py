"""CUDA flash attention's gradients against autograd through the formula in fp32: no more than twice the error of the
formula in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import flash_reference
from mainspring.ops.cuda.flash_backward import flash_attention_backward
from support.cuda_flash import FlashCases, assert_twice_as_exact, ends, on_gpu, random
from support.memory import poisoned_memory


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
    with poisoned_memory():
        results = [
            flash_attention_backward(
                dout, q, k, v, out, lse, cu_q, cu_k, max_q=max(q_lengths), max_k=max(k_lengths), scale=scale,
                causal=causal, window=window, softcap=softcap, deterministic=deterministic,
            )
            for _ in range(2 if deterministic else 1)
        ]  # fmt: skip
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))
    for got, wanted, low in zip(results[0], exact, same, strict=True):
        used = len(wanted)
        assert got.dtype is dtype
        assert not got[used:].any()
        assert_twice_as_exact(got[:used], low, wanted, roundings=2)


class TestOnGpu(FlashCases):
    pytestmark = on_gpu
    check = staticmethod(check)
    capped_magnitude = 2.0
    large_magnitude = 4.0

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
