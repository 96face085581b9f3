"""The CPU attention: as exact as torch's, and each query's bits its own, however its keys come."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops import TokenBatch
from mainspring.ops.cpu.attention import attention, write_cache
from support.cpu_kernels import (
    DTYPES,
    assert_as_exact_as_torch,
    assert_same_bits,
    random_tensor,
    requires_kernels,
    threads,
)
from support.memory import in_poisoned_memory

pytestmark = [requires_kernels, in_poisoned_memory]

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
head_dims = st.sampled_from([8, 16, 24, 40, 64, 72, 128, 256])
heads = st.sampled_from([(1, 1), (4, 4), (6, 2), (9, 3), (5, 1)])
windows = st.sampled_from([None, None, 1, 7, 200, 256, 300])
BLOCK = 16


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ends_of(lengths: list[int]) -> Tensor:
    return ints(*[sum(lengths[:i]) for i in range(len(lengths) + 1)])


@dataclass(frozen=True)
class Setting:
    """What stays the same however the keys come."""

    scale: float
    window: int | None = None
    softcap: float = 0.0

    def packed(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        return attention(
            q, k, v, ends_of(lengths), ints(*lengths), None, self.scale, self.window, self.softcap
        )

    def formula(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence whose queries are its last tokens, in the dtype of the arguments. [n, Hq, D]"""
        n, context, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * self.scale
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        behind = torch.arange(context - n, context)[:, None] - torch.arange(context)[None]
        hidden = (behind < 0) if self.window is None else (behind < 0) | (behind >= self.window)
        return (torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v).transpose(0, 1)


class Pages:
    """Keys and values of some sequences in shuffled blocks; every slot that holds no key is NaN."""

    def __init__(self, pieces: list[tuple[Tensor, Tensor]], seed: int) -> None:
        counts = [-(-k.shape[0] // BLOCK) for k, _ in pieces]
        _, self.kv_heads, self.d = pieces[0][0].shape
        shape = (sum(counts) + 2, BLOCK, self.kv_heads, self.d)
        self.k = torch.full(shape, torch.nan, dtype=pieces[0][0].dtype)
        self.v = self.k.clone()
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
        self.tables = torch.zeros(len(pieces), max(counts), dtype=torch.int32)
        for s, (blocks, (k, v)) in enumerate(zip(order.split(counts), pieces, strict=True)):
            self.tables[s, : counts[s]] = blocks
            positions = torch.arange(k.shape[0])
            slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
            write_cache(k, v, slots, self.k, self.v)

    def attend(self, s: Setting, q: Tensor, lengths: list[int], contexts: list[int]) -> Tensor:
        return attention(
            q, self.k, self.v, ends_of(lengths), ints(*contexts), self.tables, s.scale, s.window, s.softcap
        )


@settings(deadline=None, max_examples=40)
@given(
    seeds, st.lists(st.integers(1, 90), min_size=1, max_size=4), heads, head_dims, windows, dtypes,
    st.sampled_from([0.0, 20.0]),
)  # fmt: skip
def test_is_as_exact_as_torch(
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    d: int,
    window: int | None,
    dtype: torch.dtype,
    softcap: float,
) -> None:
    total = sum(lengths)
    q = random_tensor(seed, total, heads[0], d, dtype=dtype)
    k, v = (random_tensor(seed + i, total, heads[1], d, dtype=dtype) for i in (1, 2))
    setting = Setting(d**-0.5, window, softcap)
    got = setting.packed(q, k, v, lengths)
    parts = list(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True))
    exact = torch.cat([setting.formula(*(x.double() for x in part)) for part in parts])
    peer = torch.cat([setting.formula(*part) for part in parts])
    assert_as_exact_as_torch(got, peer, exact, roundings=4, magnitude=v.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [255, 256, 257, 600, 1100])
def test_is_as_exact_as_torch_over_many_chunks(context: int, dtype: torch.dtype) -> None:
    q = random_tensor(1, 5, 6, 64, dtype=dtype)
    k, v = (random_tensor(i, context, 2, 64, dtype=dtype) for i in (2, 3))
    setting = Setting(0.125)
    got = Pages([(k, v)], seed=0).attend(setting, q, [5], [context])
    exact = setting.formula(q.double(), k.double(), v.double())
    assert_as_exact_as_torch(
        got, setting.formula(q, k, v), exact, roundings=4, magnitude=v.abs().max().item()
    )


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 700), heads, st.sampled_from([8, 24, 64]), windows, dtypes, st.data())
def test_bits_are_the_same_in_prefill_chunks_decode_packed_and_paged(
    seed: int,
    length: int,
    heads: tuple[int, int],
    d: int,
    window: int | None,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    q = random_tensor(seed, length, heads[0], d, dtype=dtype)
    k, v = (random_tensor(seed + i, length, heads[1], d, dtype=dtype) for i in (1, 2))
    setting = Setting(0.3, window)
    whole = setting.packed(q, k, v, [length])
    pages = Pages([(k, v)], seed)
    assert_same_bits(pages.attend(setting, q, [length], [length]), whole)

    cut = data.draw(st.integers(0, length - 1))
    assert_same_bits(pages.attend(setting, q[cut:], [length - cut], [length]), whole[cut:])
    last = data.draw(st.integers(1, length))
    assert_same_bits(pages.attend(setting, q[last - 1 : last], [1], [last]), whole[last - 1 : last])
    assert_same_bits(setting.packed(q[:last], k[:last], v[:last], [last]), whole[:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_bits_do_not_depend_on_the_batch_or_the_threads(window: int | None, dtype: torch.dtype) -> None:
    """A batch of prefills, chunks and decodes against each sequence alone, on 1, 2 and 3 threads."""
    contexts, lengths = [520, 1, 300, 40, 777], [1, 1, 17, 40, 300]
    setting = Setting(0.2, window)
    pieces = [
        (random_tensor(10 + s, n, 3, 64, dtype=dtype), random_tensor(20 + s, n, 3, 64, dtype=dtype))
        for s, n in enumerate(contexts)
    ]
    queries = [random_tensor(30 + s, n, 9, 64, dtype=dtype) for s, n in enumerate(lengths)]
    with threads(1):
        alone = [
            Pages([piece], seed=s).attend(setting, q, [n], [context])
            for s, (piece, q, n, context) in enumerate(zip(pieces, queries, lengths, contexts, strict=True))
        ]
    pages = Pages(pieces, seed=9)
    for count in (1, 2, 3):
        with threads(count):
            together = pages.attend(setting, torch.cat(queries), lengths, contexts)
            assert_same_bits(together, torch.cat(alone))
            assert_same_bits(
                Pages(pieces[:1], seed=3).attend(setting, queries[0], [1], contexts[:1]), alone[0]
            )


def test_blocks_behind_the_window_may_be_gone() -> None:
    k, v = random_tensor(1, 400, 2, 16), random_tensor(2, 400, 2, 16)
    q = random_tensor(3, 1, 4, 16)
    pages, setting = Pages([(k, v)], seed=0), Setting(0.25, window=50)
    before = pages.attend(setting, q, [1], [400])
    pages.tables[0, : (400 - 50) // BLOCK] = 0  # the null block, full of NaN
    assert_same_bits(pages.attend(setting, q, [1], [400]), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_lose_their_maximum(dtype: torch.dtype) -> None:
    q, k = (
        random_tensor(1, 300, 2, 32, dtype=dtype, scale=100),
        random_tensor(2, 300, 1, 32, dtype=dtype, scale=100),
    )
    v = random_tensor(3, 300, 1, 32, dtype=dtype)
    setting = Setting(1.0)
    exact = setting.formula(q.double(), k.double(), v.double())
    got = setting.packed(q, k, v, [300])
    # In float32 the score itself, of 1e5, has steps of 0.01: the peer has as few digits.
    assert_as_exact_as_torch(
        got, setting.formula(q, k, v), exact, roundings=4, magnitude=v.abs().max().item()
    )


def test_a_single_token_gives_its_value() -> None:
    q, k, v = (random_tensor(i, 1, 1, 8, dtype=torch.bfloat16) for i in range(3))
    assert_same_bits(Setting(1.0).packed(q, k, v, [1]), v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_is_the_logarithm_of_the_sum(dtype: torch.dtype) -> None:
    q, k, v = (random_tensor(i, 500, 2, 16, dtype=dtype) for i in range(3))
    _, lse = attention(q, k, v, ints(0, 500), ints(500), None, 0.25, return_lse=True)
    scores = torch.einsum("ihd,jhd->ihj", q.double(), k.double()) * 0.25
    hidden = torch.ones(500, 500).triu(1).bool()
    exact = scores.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=2e-6)


def test_takes_strided_tokens_and_empty_batches() -> None:
    fused = random_tensor(0, 30, 10, 16)
    q, k, v = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    setting = Setting(0.25)
    assert_same_bits(
        setting.packed(q, k, v, [12, 18]),
        setting.packed(q.contiguous(), k.contiguous(), v.contiguous(), [12, 18]),
    )
    assert setting.packed(q[:0], k[:0], v[:0], []).shape == (0, 6, 16)
    assert setting.packed(q[:5], k[:5], v[:5], [0, 5, 0]).isfinite().all()


def test_write_cache_skips_negative_slots() -> None:
    k, v = random_tensor(1, 3, 2, 8), random_tensor(2, 3, 2, 8)
    k_cache, v_cache = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    write_cache(k, v, torch.tensor([5, -1, 0]), k_cache, v_cache)
    expected = torch.zeros(8, 2, 8)
    expected[5], expected[0] = k[0], k[2]
    assert_same_bits(k_cache.view(8, 2, 8), expected)
    assert_same_bits(v_cache[1, 1], v[0])


def test_refuses_what_it_cannot_read() -> None:
    q, k = torch.zeros(4, 4, 16), torch.zeros(4, 2, 16)
    ends, lengths = ints(0, 4), ints(4)
    with pytest.raises(BackendError, match="multiple of 8"):
        attention(
            q[..., :12].contiguous(),
            k[..., :12].contiguous(),
            k[..., :12].contiguous(),
            ends,
            lengths,
            None,
            1.0,
        )
    with pytest.raises(BackendError, match="divide"):
        attention(q[:, :3].contiguous(), k, k, ends, lengths, None, 1.0)
    with pytest.raises(BackendError, match="int32"):
        attention(q, k, k, ends.long(), lengths, None, 1.0)
    with pytest.raises(BackendError, match="fit"):
        attention(q, k, k.bfloat16(), ends, lengths, None, 1.0)
    with pytest.raises(BackendError, match="packed"):
        attention(q, k[:3], k[:3], ends, lengths, None, 1.0)
    with pytest.raises(BackendError, match="contiguous"):
        attention(q.transpose(0, 1).contiguous().transpose(0, 1), k, k, ends, lengths, None, 1.0)
    with pytest.raises(BackendError, match="block_tables"):
        attention(q, k[None], k[None], ends, lengths, torch.zeros(2, 1, dtype=torch.int32), 1.0)
    with pytest.raises(BackendError, match="slots"):
        write_cache(k, k, torch.zeros(3, dtype=torch.int64), k[None], k[None])


def test_head_sizes_that_the_kernel_does_not_know_are_left_to_the_reference() -> None:
    """Also without a gradient: a model that trains is evaluated, too."""
    batch = TokenBatch.packed([3, 4])
    q, k, v = (
        torch.randn(7, heads, 4, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)
    )
    out = ops.attention(q, k, v, batch, layer=0, scale=0.5)
    graph = ops.attention(q.requires_grad_(), k, v, batch, layer=0, scale=0.5)
    assert torch.equal(out, graph)
