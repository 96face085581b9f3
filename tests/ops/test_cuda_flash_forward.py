"""CUDA flash attention forward against the formula in fp32: no more than twice the error of the formula in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import flash_reference
from mainspring.ops.cuda.flash_forward import flash_attention_forward
from support.cuda_flash import (
    DTYPES,
    FlashCases,
    assert_twice_as_exact,
    ends,
    ints,
    on_gpu,
    random,
)
from support.memory import poisoned_memory
from support.triton_kernels import assert_same_bits


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
    with poisoned_memory():
        out, lse = flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q=max(q_lengths), max_k=max(k_lengths), scale=scale, causal=causal,
            window=window, softcap=softcap, canonical=canonical,
        )  # fmt: skip
    options = (cu_q, cu_k, scale, causal, window, softcap)
    exact, exact_lse = flash_reference.forward(q.float(), k.float(), v.float(), *options)
    same, _ = flash_reference.forward(q, k, v, *options)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    assert_twice_as_exact(out, same, exact)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=2e-3)


class TestOnGpu(FlashCases):
    pytestmark = on_gpu
    check = staticmethod(check)
    capped_magnitude = 3.0
    large_magnitude = 12.0

    def test_rising_scores(self) -> None:
        # the peak moves in every block
        q = torch.ones(512, 2, 128, device="cuda", dtype=torch.bfloat16)
        k = random(512, 2, 128) - torch.linspace(0, 6, 512, device="cuda")[:, None, None]
        v = random(512, 2, 128)
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

    @pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
    @pytest.mark.parametrize(
        ("d", "heads", "window", "softcap"),
        [(64, (8, 4), None, None), (96, (6, 2), None, None), (128, (8, 2), None, None), (128, (3, 1), 700, 30.0),
         (64, (4, 4), 70, None)],
    )  # fmt: skip
    def test_canonical_rows_have_the_same_bits_everywhere(
        self, d: int, heads: tuple[int, int], window: int | None, softcap: float | None, dtype: torch.dtype
    ) -> None:
        """Packed, alone, as a chunk of queries, and by Triton."""
        from mainspring.ops.triton.attention import attention

        lengths = [2300, 1, 700, 1024, 63, 1025]
        tokens = sum(lengths)
        q = random(tokens, heads[0], d, dtype=dtype, scale=3.0)
        k, v = (random(tokens, heads[1], d, dtype=dtype, scale=s) for s in (3.0, 1.0))

        def ours(
            q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]
        ) -> tuple[Tensor, Tensor]:
            return flash_attention_forward(
                q, k, v, ends(q_lengths), ends(k_lengths), max_q=max(q_lengths), max_k=max(k_lengths), scale=0.1,
                window=window, softcap=softcap, canonical=True,
            )  # fmt: skip

        out, lse = ours(q, k, v, lengths, lengths)
        sums = torch.full((heads[0], tokens), torch.nan, device="cuda")
        theirs = attention(
            q, k, v, ends(lengths), ints(lengths), None, 0.1, window, softcap, max_length=2300, max_context=2300,
            lse=sums,
        )  # fmt: skip
        assert_same_bits(out, theirs)
        assert_same_bits(lse, sums)
        assert_same_bits(ours(q[:2300], k[:2300], v[:2300], [2300], [2300])[0], out[:2300])
        for first in (1000, 2299):
            chunk, _ = ours(q[first:2300], k[:2300], v[:2300], [2300 - first], [2300])
            assert_same_bits(chunk, out[first:2300])

    def test_many_short_sequences(self) -> None:
        lengths = [n % 7 for n in range(150)]
        check(lengths, lengths, d=64)
        check(lengths, lengths, d=128, causal=False)

    def test_values_beyond_a_sequence_are_not_read(self) -> None:
        q, k, v = (random(200, 2, 128) for _ in range(3))
        k[90:], v[90:] = torch.nan, torch.nan
        out, lse = flash_attention_forward(
            q, k, v, ends([90, 110]), ends([90, 110]), max_q=110, max_k=110, scale=0.1, causal=False
        )
        assert out[:90].isfinite().all()
        assert lse[:, :90].isfinite().all()

    def test_strided_tensors(self) -> None:
        fused = random(300, 3, 4, 128)
        q, k, v = fused.unbind(1)
        check([200, 100], [200, 100], tensors=(q, k, v))
        q, k, v = (random(4, 300, 64).transpose(0, 1) for _ in range(3))
        check([200, 100], [200, 100], d=64, tensors=(q, k, v))
        q, k, v = (random(300, 4, 65)[..., 1:] for _ in range(3))
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
        q, k, v = (random(1500, 8, 128) for _ in range(3))
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
        q, k = (torch.zeros(s, dtype=dtype) for s in (shape_q, shape_k))
        with pytest.raises(BackendError, match=message):
            flash_attention_forward(q, k, k, cu, cu, **{"max_q": 4, "max_k": 4, "scale": 0.1, **options})

    def test_values_and_limits_are_named(self) -> None:
        good = (4, 4, 64), (4, 2, 64)
        self.refused("float32", *good, dtype=torch.float32)
        self.refused("64, 96, 128, 192, 256, not 80", (4, 4, 80), (4, 2, 80))
        self.refused("3 key heads do not divide the 4", (4, 4, 64), (4, 3, 64))
        self.refused("must be", (4, 4, 64), (4, 2, 128))
        self.refused("int32", *good, cu=torch.zeros(2, dtype=torch.int64))
        self.refused("64, 96, 128 in canonical order, not 256", (4, 4, 256), (4, 2, 256), canonical=True)
        self.refused("not on cpu", *good)
