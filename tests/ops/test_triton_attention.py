"""Triton's attention: as exact as torch's, and each query's bits its own, however its keys come."""

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
from mainspring.ops.flash_reference import forward
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

BLOCK = 16
head_dims = st.sampled_from([8, 16, 24, 64, 128] if INTERPRETED else [8, 64, 96, 128, 256])
heads = st.sampled_from([(2, 2), (6, 2), (3, 1)] if INTERPRETED else [(1, 1), (4, 4), (6, 2), (9, 3), (5, 1)])
windows = st.sampled_from([None, None, 1, 7, 70, 600])
softcaps = st.sampled_from([None, None, 5.0, 50.0])
long = st.integers(1, 140) if INTERPRETED else st.integers(1, 1400)


def small() -> dict[str, Any]:
    """In the interpreter, which is slow: tiles and chunks so small that few keys make several."""
    from mainspring.ops.triton.canonical_order import Tile

    return {"tile": Tile(32, 32, 4, 1), "chunk": 64} if INTERPRETED else {}


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ends_of(lengths: list[int]) -> Tensor:
    return ints([sum(lengths[:i]) for i in range(len(lengths) + 1)])


@dataclass(frozen=True)
class Setting:
    """What stays the same however the keys come."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[int],
        split: bool | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        from mainspring.ops.triton.attention import attention

        longest = max(lengths)
        return attention(
            q, k, v, ends_of(lengths), ints(lengths), None, self.scale, self.window, self.softcap,
            max_length=longest, max_context=longest, split=split, lse=lse, **small(),
        )  # fmt: skip

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, pieces: list[int], split: bool | None) -> Tensor:
        """One sequence through a paged cache whose blocks lie in a random order, a piece at a time."""
        from mainspring.ops.triton.attention import attention
        from mainspring.ops.triton.write_cache import write_cache

        total, blocks = q.shape[0], -(-q.shape[0] // BLOCK)
        shape = (blocks + 1, BLOCK, *k.shape[1:])
        k_cache, v_cache = (torch.full(shape, torch.nan, dtype=k.dtype, device=DEVICE) for _ in range(2))
        table = 1 + torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
        positions = torch.arange(total)
        slots = (table[positions // BLOCK] * BLOCK + positions % BLOCK).to(DEVICE)
        tables = table.to(DEVICE, torch.int32)[None]
        out, done, i = [], 0, 0
        while done < total:
            n = min(pieces[i % len(pieces)], total - done)
            i += 1
            part = slice(done, done + n)
            write_cache(k[part], v[part], slots[part], k_cache, v_cache)
            done += n
            piece = attention(
                q[part], k_cache, v_cache, ints([0, n]), ints([done]), tables, self.scale, self.window,
                self.softcap, max_length=n, max_context=done, split=split, **small(),
            )  # fmt: skip
            out.append(piece)
        return torch.cat(out)


def formula(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], setting: Setting) -> tuple[Tensor, Tensor]:
    """The formula in q's dtype: (out, lse)."""
    ends = ends_of(lengths)
    return forward(q, k, v, ends, ends, setting.scale, True, setting.window, setting.softcap)


def qkv(seed: int, tokens: int, shape: tuple[int, int], d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views of one fused tensor."""
    q_heads, kv_heads = shape
    fused = random_tensor(seed, tokens, q_heads + 2 * kv_heads, d, dtype=dtype)
    return fused.split((q_heads, kv_heads, kv_heads), 1)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=0, max_size=1 if INTERPRETED else 3),
    last=long,
    shape=heads,
    d=head_dims,
    dtype=st.sampled_from(DTYPES),
    window=windows,
    softcap=softcaps,
    split=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_exact_as_torch(
    lengths: list[int],
    last: int,
    shape: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    split: bool,
    seed: int,
) -> None:
    lengths = [*lengths, last]
    q, k, v = qkv(seed, sum(lengths), shape, d, dtype)
    setting = Setting(d**-0.5, window, softcap)
    lse = torch.empty(q.shape[1], q.shape[0], device=DEVICE)
    got = setting.packed(q, k, v, lengths, split, lse)
    exact, exact_lse = formula(q.double(), k.double(), v.double(), lengths, setting)
    theirs, _ = formula(q, k, v, lengths, setting)
    # 4: weights are rounded to the dtype before they meet the values, as in every flash attention; a capped score
    # has the absolute error of the cap
    assert_as_exact_as_torch(got, theirs, exact, 4 if dtype != torch.float32 else 16 if not softcap else 64)
    assert (lse - exact_lse).abs().max() <= 2e-5 * (1 + exact_lse.abs().max())  # fp32 sums of exact products


@settings(max_examples=2 if INTERPRETED else EXAMPLES, deadline=None)
@given(
    tokens=long,
    pieces=st.lists(st.integers(50, 100) if INTERPRETED else st.integers(1, 300), min_size=1, max_size=3),
    shape=heads,
    d=head_dims,
    dtype=st.sampled_from(DTYPES),
    window=windows,
    softcap=softcaps,
    split=st.sampled_from([None, True, False]),
)
def test_whole_prefill_chunked_prefill_and_a_batch_give_the_same_bits(
    tokens: int,
    pieces: list[int],
    shape: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    split: bool | None,
) -> None:
    setting = Setting(d**-0.5, window, softcap)
    q, k, v = qkv(tokens, tokens + 7, shape, d, dtype)
    batch = setting.packed(q, k, v, [7, tokens], False)
    whole = setting.packed(q[7:], k[7:], v[7:], [tokens])
    assert_same_bits(whole, batch[7:])
    assert_same_bits(setting.packed(q, k, v, [7, tokens], True), batch)
    assert_same_bits(setting.chunked(q[7:], k[7:], v[7:], pieces, split), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [24] if INTERPRETED else [64, 128, 256])
def test_decode_gives_the_bits_of_prefill(dtype: torch.dtype, d: int) -> None:
    from mainspring.ops.triton.attention import attention

    tokens = 150 if INTERPRETED else 2050
    q, k, v = qkv(0, tokens, (4, 2), d, dtype)
    whole = Setting(0.2).packed(q, k, v, [tokens])
    blocks = -(-tokens // BLOCK)
    pad = blocks * BLOCK - tokens
    k_cache, v_cache = (F.pad(x, (0, 0, 0, 0, 0, pad), value=torch.nan) for x in (k, v))
    k_cache, v_cache = (x.reshape(blocks, BLOCK, 2, d).contiguous() for x in (k_cache, v_cache))
    ends = [1, 15, 16, 17, 63, 64, 65, 127, 128, tokens - 1, tokens]
    ends += [] if INTERPRETED else [200, 1023, 1024, 1025]
    for split in (True, False, None):
        out = attention(
            q[[n - 1 for n in ends]], k_cache, v_cache, ints(list(range(len(ends) + 1))), ints(ends),
            torch.arange(blocks, dtype=torch.int32, device=DEVICE).repeat(len(ends), 1), 0.2,
            max_length=1, max_context=tokens, split=split, **small(),
        )  # fmt: skip
        assert_same_bits(out, whole[[n - 1 for n in ends]])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("d", [16] if INTERPRETED else [64, 128])
def test_the_number_of_rows_in_a_tile_changes_no_bit(dtype: torch.dtype, d: int) -> None:
    from mainspring.ops.triton.attention import attention
    from mainspring.ops.triton.canonical_order import Tile, tile_of

    tokens = 150 if INTERPRETED else 1500
    q, k, v = qkv(0, tokens, (6, 2), d, dtype)
    keys = tile_of(d, dtype).keys
    narrow, wide = (
        attention(
            q,
            k,
            v,
            ends_of([tokens]),
            ints([tokens]),
            None,
            0.2,
            max_length=tokens,
            max_context=tokens,
            tile=tile,
        )
        for tile in (Tile(64, keys, 4, 2), Tile(128, keys, 8, 2))
    )
    assert_same_bits(wide, narrow)


def test_large_scores() -> None:
    q, k, v = qkv(0, 70, (2, 2), 16, torch.float32)
    got = Setting(50.0).packed(q * 30, k * 30, v, [70])
    exact, _ = formula(q.double() * 30, k.double() * 30, v.double(), [70], Setting(50.0))
    assert (got - exact).abs().max() <= 0.05 * exact.abs().max()


def test_slots_below_zero_are_skipped() -> None:
    from mainspring.ops.triton.write_cache import write_cache

    k, v = random_tensor(0, 3, 2, 8), random_tensor(1, 3, 2, 8)
    k_cache, v_cache = torch.zeros(2, 4, 2, 8, device=DEVICE), torch.zeros(2, 4, 2, 8, device=DEVICE)
    write_cache(k, v, torch.tensor([5, -1, 2], device=DEVICE), k_cache, v_cache)
    assert_same_bits(k_cache.flatten(0, 1)[[5, 2]], k[[0, 2]])
    assert_same_bits(v_cache.flatten(0, 1)[[5, 2]], v[[0, 2]])
    assert int((k_cache != 0).sum()) == 2 * 16


def test_bad_input_is_refused() -> None:
    q, k, v = qkv(0, 5, (4, 2), 16, torch.float32)
    with pytest.raises(BackendError, match="scale"):
        Setting(0.0).packed(q, k, v, [5])
    with pytest.raises(BackendError, match="divide"):
        Setting(1.0).packed(q[:, :3].contiguous(), k, v, [5])
    with pytest.raises(BackendError, match="256"):
        Setting(1.0).packed(*(x.repeat(1, 1, 17) for x in (q, k, v)), [5])
    with pytest.raises(BackendError, match="do not fit"):
        Setting(1.0).packed(q, k.half(), v, [5])
