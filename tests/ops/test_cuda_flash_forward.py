"""CUDA flash attention forward against the formula in fp32: no more than twice the error of the formula in 16 bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import flash_reference
from mainspring.ops.cuda.compiler import find_nvcc
from mainspring.ops.cuda.flash_forward import flash_attention_forward

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
    scale: float | None = None,
    magnitude: float = 1.0,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
    canonical: bool = False,
) -> None:
    q, k, v = tensors or (
        random(sum(q_lengths), heads, d, dtype=dtype, scale=magnitude),
        random(sum(k_lengths), kv_heads, d, dtype=dtype, scale=magnitude),
        random(sum(k_lengths), kv_heads, d, dtype=dtype),
    )
    cu_q, cu_k = ends(q_lengths), ends(k_lengths)
    scale = scale or d**-0.5
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # fills new memory with NaN: what is not written shows
    try:
        out, lse = flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q=max(q_lengths), max_k=max(k_lengths), scale=scale, causal=causal,
            window=window, softcap=softcap, canonical=canonical,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    options = (cu_q, cu_k, scale, causal, window, softcap)
    exact, exact_lse = flash_reference.forward(q.float(), k.float(), v.float(), *options)
    same, _ = flash_reference.forward(q, k, v, *options)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    if out.numel() == 0:
        return
    rounding = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    bound = 2 * (same.float() - exact).abs().max().item() + rounding
    error = (out.float() - exact).abs().max().item()
    assert error <= bound  # false for NaN
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=2e-3)


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
        check([300, 65], [300, 200], d=d, softcap=20.0, magnitude=3.0)
        check([300, 65], [300, 200], d=d, softcap=20.0, magnitude=3.0, causal=False, window=100)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (12, 4), (7, 1)])
    def test_head_groups(self, heads: int, kv_heads: int) -> None:
        check([260, 70], [260, 70], heads=heads, kv_heads=kv_heads)

    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("d", [64, 128])
    def test_large_scores(self, d: int, dtype: torch.dtype) -> None:
        check([400], [400], d=d, dtype=dtype, magnitude=12.0)
        check([400], [400], d=d, dtype=dtype, magnitude=12.0, causal=False)

    def test_rising_scores(self) -> None:
        # the peak moves in every block
        q = torch.ones(512, 2, 128, device="cuda", dtype=torch.bfloat16)
        k = (
            random(512, 2, 128, dtype=torch.bfloat16)
            - torch.linspace(0, 6, 512, device="cuda")[:, None, None]
        )
        v = random(512, 2, 128, dtype=torch.bfloat16)
        for keys in (k, k.flip(0)):
            check([512], [512], tensors=(q, keys.bfloat16().contiguous(), v), causal=False, scale=0.1)

    @pytest.mark.parametrize("window", [None, 300])
    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize("d", [64, 96, 128])
    def test_canonical_order(self, d: int, dtype: torch.dtype, window: int | None) -> None:
        options = {"d": d, "dtype": dtype, "window": window, "canonical": True}
        check([1500, 1, 700, 512, 63], [1500, 1, 700, 512, 63], **options)
        check([1, 100, 0, 513], [513, 1700, 40, 1024], **options)
        check([300, 40], [77, 3], magnitude=8.0, **options)

    @pytest.mark.parametrize("softcap", [None, 30.0])
    @pytest.mark.parametrize("d", [64, 128])
    def test_canonical_rows_have_the_same_bits_everywhere(self, d: int, softcap: float | None) -> None:
        lengths = [1500, 1, 700, 512, 63, 513]
        q = random(sum(lengths), 8, d, dtype=torch.bfloat16, scale=3.0)
        k, v = (random(sum(lengths), 4, d, dtype=torch.bfloat16, scale=s) for s in (3.0, 1.0))

        def ours(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
            return flash_attention_forward(
                q, k, v, ends(q_lengths), ends(k_lengths), max_q=max(q_lengths), max_k=max(k_lengths), scale=0.1,
                softcap=softcap, canonical=True,
            )[0]  # fmt: skip

        out = ours(q, k, v, lengths, lengths)
        alone = ours(q[:1500], k[:1500], v[:1500], [1500], [1500])
        assert torch.equal(alone, out[:1500])
        for first in (1000, 1499):
            chunk = ours(q[first:1500], k[:1500], v[:1500], [1500 - first], [1500])
            assert torch.equal(chunk, out[first:1500])

    def test_many_short_sequences(self) -> None:
        lengths = [n % 7 for n in range(150)]
        check(lengths, lengths, d=64)
        check(lengths, lengths, d=128, causal=False)

    def test_values_beyond_a_sequence_are_not_read(self) -> None:
        q, k, v = (random(200, 2, 128, dtype=torch.bfloat16) for _ in range(3))
        k[90:], v[90:] = torch.nan, torch.nan
        out, lse = flash_attention_forward(
            q, k, v, ends([90, 110]), ends([90, 110]), max_q=110, max_k=110, scale=0.1, causal=False
        )
        assert out[:90].isfinite().all()
        assert lse[:, :90].isfinite().all()

    def test_strided_tensors(self) -> None:
        fused = random(300, 3, 4, 128, dtype=torch.bfloat16)
        q, k, v = fused.unbind(1)
        check([200, 100], [200, 100], tensors=(q, k, v))
        q, k, v = (random(4, 300, 64, dtype=torch.bfloat16).transpose(0, 1) for _ in range(3))
        check([200, 100], [200, 100], d=64, tensors=(q, k, v))
        q, k, v = (random(300, 4, 65, dtype=torch.bfloat16)[..., 1:] for _ in range(3))
        check([200, 100], [200, 100], d=64, tensors=(q, k, v))

    def test_no_tokens(self) -> None:
        q, k = (torch.empty(n, 4, 128, device="cuda", dtype=torch.bfloat16) for n in (0, 10))
        options = {"max_q": 0, "max_k": 0, "scale": 0.1}
        out, lse = flash_attention_forward(q, q, q, ends([0]), ends([0]), **options)
        assert out.shape == (0, 4, 128)
        assert lse.shape == (4, 0)
        out, lse = flash_attention_forward(k, q, q, ends([10]), ends([0]), max_q=10, max_k=0, scale=0.1)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()

    def test_same_bits_every_time(self) -> None:
        q, k, v = (random(1500, 8, 128, dtype=torch.bfloat16) for _ in range(3))
        cu = ends([1000, 500])
        first = flash_attention_forward(q, k, v, cu, cu, max_q=1000, max_k=1000, scale=0.1)
        for _ in range(5):
            again = flash_attention_forward(q, k, v, cu, cu, max_q=1000, max_k=1000, scale=0.1)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class TestRefusals:
    def refused(
        self, message: str, shape_q: tuple[int, ...], shape_k: tuple[int, ...], **options: object
    ) -> None:
        dtype = options.pop("dtype", torch.bfloat16)
        cu = options.pop("cu", torch.zeros(2, dtype=torch.int32))
        q, k = (torch.zeros(s, dtype=dtype) for s in (shape_q, shape_k))  # type: ignore[call-overload]
        with pytest.raises(BackendError, match=message):
            flash_attention_forward(q, k, k, cu, cu, **{"max_q": 4, "max_k": 4, "scale": 0.1, **options})  # type: ignore[arg-type]

    def test_values_and_limits_are_named(self) -> None:
        good = (4, 4, 64), (4, 2, 64)
        self.refused("float32", *good, dtype=torch.float32)
        self.refused("64, 96, 128, 192, 256, not 80", (4, 4, 80), (4, 2, 80))
        self.refused("3 key heads do not divide the 4", (4, 4, 64), (4, 3, 64))
        self.refused("must be", (4, 4, 64), (4, 2, 128))
        self.refused("int32", *good, cu=torch.zeros(2, dtype=torch.int64))
        self.refused("64, 96, 128 in canonical order, not 256", (4, 4, 256), (4, 2, 256), canonical=True)
        self.refused("not on cpu", *good)
