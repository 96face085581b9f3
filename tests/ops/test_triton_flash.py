"""Flash attention in Triton: forward and backward as exact as torch's, in every option, and the same bits each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.flash_reference import forward as reference
from mainspring.ops.flash_reference import visible
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

head_dims = st.sampled_from([8, 16, 40] if INTERPRETED else [8, 40, 64, 64, 96, 128, 128, 192, 256])
heads = st.sampled_from([(2, 2), (4, 2), (3, 1)] if INTERPRETED else [(1, 1), (4, 4), (6, 2), (5, 1)])
windows = st.sampled_from([None, None, 1, 7, 70, 300])
caps = st.sampled_from([None, None, 2.0, 30.0])
lengths = st.integers(0, 50) if INTERPRETED else st.integers(0, 700)
pairs = st.lists(st.tuples(lengths, lengths), min_size=1, max_size=3 if INTERPRETED else 5)


def small() -> dict[str, Any]:
    """In the interpreter, which is slow: tiles so small that few keys make several."""
    from mainspring.ops.triton.flash_forward import Tile

    return {"tile": Tile(32, 32, 4, 1)} if INTERPRETED else {}


def small_backward() -> dict[str, Any]:
    from mainspring.ops.triton.flash_backward import BackwardTiles
    from mainspring.ops.triton.flash_forward import Tile

    return {"tiles": BackwardTiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))} if INTERPRETED else {}


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """What stays the same whoever computes it."""

    queries: list[int]
    keys: list[int]
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float = 0.2

    def formula(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ends = ends_of(self.queries), ends_of(self.keys)
        return reference(q, k, v, *ends, self.scale, self.causal, self.window, self.softcap)

    def torchs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """torch's own attention; the formula in the inputs' dtype where it has none, or gives NaN."""
        if self.softcap or any(n > m or m == 0 for n, m in zip(self.queries, self.keys, strict=True)):
            return self.formula(q, k, v)[0]
        out = []
        pieces = zip(q.split(self.queries), k.split(self.keys), v.split(self.keys), strict=True)
        for queries, keys, values in pieces:
            mask = visible(queries.shape[0], keys.shape[0], self.causal, self.window, q.device)
            a, b, c = (x.transpose(0, 1)[None] for x in (queries, keys, values))
            product = F.scaled_dot_product_attention(
                a, b, c, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
            out.append(product[0].transpose(0, 1))
        return torch.cat(out)

    def options(self) -> dict[str, Any]:
        return {
            "cu_q": ends_of(self.queries), "cu_k": ends_of(self.keys), "max_q": max(self.queries),
            "max_k": max(self.keys), "scale": self.scale, "causal": self.causal, "window": self.window,
            "softcap": self.softcap,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from mainspring.ops.triton.flash_forward import flash_attention_forward

        return flash_attention_forward(q, k, v, **self.options(), **small())

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from mainspring.ops.triton.flash_backward import flash_attention_backward

        return flash_attention_backward(dout, q, k, v, out, lse, **self.options(), **small_backward())

    def inputs(
        self, seed: int, sizes: tuple[int, int], d: int, dtype: torch.dtype, values: float = 1.0
    ) -> list[Tensor]:
        """q, k, v and dout, whose tokens are strided."""
        rows = sum(self.queries), sum(self.keys), sum(self.keys), sum(self.queries)
        counts = sizes[0], sizes[1], sizes[1], sizes[0]
        wide = [
            random_tensor(seed + i, n, h * d + 16, dtype=dtype, scale=values)
            for i, (n, h) in enumerate(zip(rows, counts, strict=True))
        ]
        return [x[:, : h * d].unflatten(1, (h, d)) for x, h in zip(wide, counts, strict=True)]

    def check(
        self, seed: int, sizes: tuple[int, int], d: int, dtype: torch.dtype, values: float = 1.0
    ) -> None:
        q, k, v, dout = self.inputs(seed, sizes, d, dtype, values)
        out, lse = self.forward(q, k, v)
        got = (out, *self.backward(dout, q, k, v, out, lse))
        exact_inputs = [x.double().requires_grad_() for x in (q, k, v)]
        exact, exact_lse = self.formula(*exact_inputs)
        peer_inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        peer = self.torchs(*peer_inputs)
        exacts = (exact, *torch.autograd.grad(exact, exact_inputs, dout.double()))
        peers = (peer, *torch.autograd.grad(peer, peer_inputs, dout))
        # The kernels' tanh is right to a rounding of 1, so a capped score to one of the cap, however small it is.
        magnitude = 4 * values**2 * d**0.5 + values * (self.softcap or 0.0)
        for mine, torchs, right in zip(got, peers, exacts, strict=True):
            assert_as_exact_as_torch(mine, torchs, right.detach(), magnitude=magnitude)
        empty = exact_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty)
        zero = exact_lse.new_zeros(())
        torch.testing.assert_close(
            lse.double().where(~empty, zero), exact_lse.detach().where(~empty, zero), atol=1e-4, rtol=1e-5
        )
        assert not out[empty.T].any()
        assert not got[1][empty.T].any()


@settings(max_examples=EXAMPLES if INTERPRETED else 6, deadline=None)  # each compiles kernels of its own
@given(
    seed=st.integers(0, 1 << 20), counts=pairs, sizes=heads, d=head_dims,
    dtype=st.sampled_from(DTYPES if INTERPRETED else DTYPES[1:]), causal=st.booleans(), window=windows, softcap=caps,
)  # fmt: skip
def test_every_option(
    seed: int, counts: list[tuple[int, int]], sizes: tuple[int, int], d: int, dtype: torch.dtype, causal: bool,
    window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    queries, keys = ([pair[i] for pair in counts] for i in range(2))
    Case(queries, keys, causal, window, softcap).check(seed, sizes, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention(dtype: torch.dtype, causal: bool) -> None:
    counts = [33, 1, 32] if INTERPRETED else [300, 1, 128, 1000]
    d = 16 if INTERPRETED else 128 if causal else 64
    Case(counts, counts, causal, scale=d**-0.5).check(3, (4, 2), d, dtype)


def test_large_values() -> None:
    counts = [60] if INTERPRETED else [500, 129]
    d = 16 if INTERPRETED else 128
    Case(counts, counts, scale=d**-0.5).check(4, (2, 2), d, DTYPES[-1], values=10.0)


def test_same_bits_each_time() -> None:
    counts = [40, 5] if INTERPRETED else [900, 77, 513]
    case = Case(counts, counts)
    q, k, v, dout = case.inputs(5, (2, 1) if INTERPRETED else (4, 2), 16 if INTERPRETED else 64, DTYPES[-1])
    runs = []
    for _ in range(2 if INTERPRETED else 5):
        out, lse = case.forward(q, k, v)
        runs.append((out, lse, *case.backward(dout, q, k, v, out, lse)))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert_same_bits(a, b)


def test_nothing_to_do() -> None:
    case = Case([0, 0], [0, 0])
    q, k, v, dout = case.inputs(6, (2, 1), 16, torch.float32)
    out, lse = case.forward(q, k, v)
    assert out.shape == (0, 2, 16)
    assert lse.shape == (2, 0)
    assert [x.shape for x in case.backward(dout, q, k, v, out, lse)] == [(0, 2, 16), (0, 1, 16), (0, 1, 16)]


def test_the_formula_has_the_right_gradient() -> None:
    case = Case([3, 0, 5, 1], [5, 2, 3, 0])
    for causal in (True, False):
        for window in (None, 2):
            for softcap in (None, 1.5):
                same = Case(case.queries, case.keys, causal, window, softcap)
                inputs = [
                    random_tensor(i, n, h, 3).double().requires_grad_()
                    for i, (n, h) in enumerate([(9, 4), (10, 2), (10, 2)])
                ]

                def finite(q: Tensor, k: Tensor, v: Tensor, same: Case = same) -> list[Tensor]:
                    return [x.masked_fill(x == -torch.inf, 0.0) for x in same.formula(q, k, v)]

                assert torch.autograd.gradcheck(finite, inputs, fast_mode=True)


def test_what_does_not_fit_is_refused() -> None:
    from mainspring.ops.triton.flash_backward import flash_attention_backward
    from mainspring.ops.triton.flash_forward import flash_attention_forward

    case = Case([5], [5])
    q, k, v, dout = case.inputs(7, (4, 2), 16, torch.float32)
    ends = ends_of([5]), ends_of([5])
    good: dict[str, Any] = {"cu_q": ends[0], "cu_k": ends[1], "max_q": 5, "max_k": 5, "scale": 1.0}
    bad: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("takes float32", (q.double(), k, v), {}),
        ("differ in dtype", (q.half(), k, v), {}),
        ("takes q", (q, k, v[:-1]), {}),
        ("multiple of 8", (q[..., :12], k[..., :12], v[..., :12]), {}),
        ("divide", (q[:, :3], k, v), {}),
        ("int32", (q, k, v), {"cu_q": ends[0].long()}),
        ("int32", (q, k, v), {"cu_k": ends[1][:1]}),
        ("max_q", (q, k, v), {"max_q": 6}),
        ("max_k", (q, k, v), {"max_k": 6}),
        ("scale", (q, k, v), {"scale": 0.0}),
        ("window", (q, k, v), {"window": -1}),
        ("softcap", (q, k, v), {"softcap": -1.0}),
    ]
    for message, arguments, options in bad:
        with pytest.raises(BackendError, match=message):
            flash_attention_forward(*arguments, **{**good, **options})
    out, lse = case.forward(q, k, v)
    for message, results in (
        ("dout", (dout[:-1], out, lse)),
        ("dout", (dout, out.half(), lse)),
        ("lse", (dout, out, lse[:-1])),
        ("lse", (dout, out, lse.double())),
    ):
        with pytest.raises(BackendError, match=message):
            flash_attention_backward(results[0], q, k, v, results[1], results[2], **good)
