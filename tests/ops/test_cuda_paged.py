"""The CUDA C++ kernels over a paged cache: as exact as the formula, and bit for bit the attention in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.ops.cuda.support import refuses
from mainspring.ops.flash_reference import forward
from mainspring.ops.policy import Policy
from mainspring.ops.registry import Call
from support.triton_kernels import assert_same_bits, random_tensor

DEVICE = "cuda"
CONTEXTS = (1, 15, 16, 17, 63, 64, 65, 127, 129, 700, 1023, 1024, 1025, 2300)


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return refuses(Call("cuda", torch.bfloat16, Policy("lockstep"), False))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason() is not None, reason=str(_reason()))]


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ends_of(lengths: Sequence[int]) -> Tensor:
    return ints([0, *accumulate(lengths)])


@dataclass(frozen=True)
class Case:
    """Whole sequences, of which the last `queries` tokens are asked for."""

    q: Tensor  # [sum of contexts, Hq, D]
    k: Tensor
    v: Tensor
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    block_size: int
    scale: float

    @staticmethod
    def random(
        d: int,
        dtype: torch.dtype,
        heads: tuple[int, int],
        contexts: tuple[int, ...] = CONTEXTS,
        queries: int = 1,
        block_size: int = 16,
        seed: int = 0,
    ) -> Case:
        tokens = sum(contexts)
        q, k, v = (
            random_tensor(seed + i, tokens, h, d, dtype=dtype)
            for i, h in enumerate((heads[0], heads[1], heads[1]))
        )
        lengths = tuple(min(queries, n) for n in contexts)
        return Case(q * 2, k, v, contexts, lengths, block_size, 1.5 * d**-0.5)

    def rows(self) -> Tensor:
        """Which tokens are asked for."""
        pieces = zip(accumulate(self.contexts), self.lengths, strict=True)
        return torch.cat([torch.arange(end - n, end, device=DEVICE) for end, n in pieces])

    def cache(self) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values, block tables): blocks in a random order, NaN where no key is."""
        blocks = [-(-n // self.block_size) for n in self.contexts]
        order = 1 + torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(7)).to(DEVICE)
        tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=DEVICE)
        shape = (sum(blocks) + 1, self.block_size, *self.k.shape[1:])
        caches = []
        for x in (self.k, self.v):
            cache = torch.full(shape, math.nan, dtype=x.dtype, device=DEVICE)
            first = 0
            for s, (piece, count) in enumerate(zip(x.split(self.contexts), blocks, strict=True)):
                ids = order[first : first + count]
                tables[s, :count] = ids
                padded = torch.full(
                    (count * self.block_size, *x.shape[1:]), math.nan, dtype=x.dtype, device=DEVICE
                )
                padded[: piece.shape[0]] = piece
                cache[ids] = padded.view(count, *shape[1:])
                first += count
            caches.append(cache)
        return caches[0], caches[1], tables

    def decode(self, window: int | None = None, softcap: float | None = None, **options: Any) -> Tensor:
        from mainspring.ops.cuda.paged_attention import paged_decode

        keys, values, tables = self.cache()
        queries = self.q[self.rows()]
        out = torch.full_like(queries, math.nan)
        return paged_decode(
            queries, keys, values, ends_of(self.lengths), ints(self.contexts), tables, self.scale, window, softcap,
            max_length=max(self.lengths), max_context=max(self.contexts), out=out, **options,
        )  # fmt: skip

    def prefill(self, window: int | None = None, softcap: float | None = None, **options: Any) -> Tensor:
        from mainspring.ops.cuda.paged_prefill import paged_prefill

        keys, values, tables = self.cache()
        queries = self.q[self.rows()]
        out = torch.full_like(queries, math.nan)
        return paged_prefill(
            queries, keys, values, ends_of(self.lengths), ints(self.contexts), tables, self.scale, window, softcap,
            max_length=max(self.lengths), max_context=max(self.contexts), out=out, **options,
        )  # fmt: skip

    def whole(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        """The same rows by Triton, as training computes them."""
        from mainspring.ops.triton.attention import attention

        longest = max(self.contexts)
        return attention(
            self.q, self.k, self.v, ends_of(self.contexts), ints(self.contexts), None, self.scale, window, softcap,
            max_length=longest, max_context=longest,
        )[self.rows()]  # fmt: skip

    def exact(self, window: int | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """(out, lse) by the formula in float64."""
        ends = ends_of(self.contexts)
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        out, lse = forward(q, k, v, ends, ends, self.scale, True, window, softcap)
        return out[self.rows()], lse[:, self.rows()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [16, 64, 80, 96, 128, 192, 256])
def test_decode_gives_the_bits_of_training(d: int, dtype: torch.dtype) -> None:
    case = Case.random(d, dtype, (8, 2))
    got = case.decode()
    assert_same_bits(got, case.whole())
    exact, _ = case.exact()
    assert (got - exact).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 3e-3) * exact.abs().max()


@pytest.mark.parametrize(
    ("heads", "queries", "block_size", "window", "softcap"),
    [
        ((3, 3), 1, 16, None, None),
        ((12, 1), 1, 32, None, None),
        ((40, 1), 1, 16, None, None),
        ((8, 2), 4, 16, None, None),
        ((8, 2), 7, 256, None, None),
        ((8, 2), 1, 48, 70, None),
        ((8, 2), 5, 16, 600, None),
        ((8, 2), 1, 16, None, 20.0),
        ((8, 2), 2, 64, 7, 50.0),
    ],
)
def test_groups_drafts_windows_and_caps(
    heads: tuple[int, int], queries: int, block_size: int, window: int | None, softcap: float | None
) -> None:
    case = Case.random(128, torch.bfloat16, heads, queries=queries, block_size=block_size)
    lse = torch.full((heads[0], sum(case.lengths)), math.nan, device=DEVICE)
    got = case.decode(window, softcap, lse=lse)
    assert_same_bits(got, case.whole(window, softcap))
    exact, exact_lse = case.exact(window, softcap)
    assert (got - exact).abs().max() <= 2e-2 * exact.abs().max()
    assert (lse - exact_lse).abs().max() <= 2e-5 * (1 + exact_lse.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 96, 128])
def test_prefill_gives_the_bits_of_training(d: int, dtype: torch.dtype) -> None:
    case = Case.random(d, dtype, (8, 2), queries=10_000)
    got = case.prefill()
    assert_same_bits(got, case.whole())
    exact, _ = case.exact()
    assert (got - exact).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 3e-3) * exact.abs().max()


@pytest.mark.parametrize(
    ("heads", "queries", "block_size", "window", "softcap"),
    [
        ((3, 3), 200, 16, None, None),
        ((12, 1), 33, 32, None, None),
        ((8, 2), 300, 48, 70, None),
        ((8, 2), 900, 16, 600, None),
        ((8, 2), 130, 256, None, 20.0),
    ],
)
def test_prefill_of_chunks_with_groups_windows_and_caps(
    heads: tuple[int, int], queries: int, block_size: int, window: int | None, softcap: float | None
) -> None:
    case = Case.random(128, torch.bfloat16, heads, queries=queries, block_size=block_size)
    lse = torch.full((heads[0], sum(case.lengths)), math.nan, device=DEVICE)
    got = case.prefill(window, softcap, lse=lse)
    assert_same_bits(got, case.whole(window, softcap))
    _, exact_lse = case.exact(window, softcap)
    assert (lse - exact_lse).abs().max() <= 2e-5 * (1 + exact_lse.abs().max())


def test_prefill_leaves_the_rows_of_short_sequences_alone() -> None:
    case = Case.random(64, torch.bfloat16, (8, 2), queries=40)
    got = case.prefill(longer_than=16)
    long = torch.cat([torch.full((n,), n > 16, device=DEVICE) for n in case.lengths])
    assert_same_bits(got[long], case.whole()[long])
    assert got[~long].isnan().all()


def test_a_row_does_not_depend_on_the_batch_nor_on_the_number_of_warps() -> None:
    case = Case.random(64, torch.bfloat16, (8, 2), (9000, *CONTEXTS * 8, 12000))
    alone = Case(case.q[:9000], case.k[:9000], case.v[:9000], (9000,), (1,), 16, case.scale)
    together = case.decode()
    assert_same_bits(together[:1], alone.decode())
    assert_same_bits(together, case.decode(max_warps=2))


def test_more_sequences_than_threads() -> None:
    """Chunks of a row lie within a block, across blocks and beyond its last units."""
    contexts = tuple(1 + (s * 977) % 1500 + (s % 7 == 0) * 2500 for s in range(300))
    case = Case.random(64, torch.bfloat16, (8, 2), contexts)
    assert_same_bits(case.decode(), case.whole())


@pytest.mark.parametrize("fill", ["zeros", "other lengths", "no lengths at all"])
def test_lengths_and_tables_that_the_kernel_ahead_writes_late_are_seen(fill: str) -> None:
    """Decode looks its first keys up before that kernel has ended.

    Rows of one chunk: partial results of several, or their counters, would be filled by a kernel of torch's in between.
    """
    from mainspring.ops.cuda.paged_attention import KEY_CHUNK, paged_decode
    from support.late_writer import write_late

    case = Case.random(64, torch.bfloat16, (8, 2), tuple(n for n in CONTEXTS if n <= KEY_CHUNK))
    keys, values, tables = case.cache()
    queries, count = case.q[case.rows()], len(case.contexts)
    fresh = torch.cat([ints(case.contexts), tables.flatten()])
    stale = {
        "zeros": torch.zeros_like(fresh),
        "other lengths": torch.cat([fresh[:count].flip(0), fresh[count:]]),
        "no lengths at all": torch.where(torch.arange(len(fresh), device=DEVICE) % 2 == 0, 1 << 30, -7).int(),
    }[fill]
    seen = stale.clone()
    contexts, blocks = seen[:count], seen[count:].view_as(tables)
    out = torch.full_like(queries, math.nan)
    want, ends = case.whole(), ends_of(case.lengths)
    for _ in range(3):
        seen.copy_(stale)
        out.fill_(math.nan)
        torch.cuda.synchronize()
        write_late(seen, fresh)
        paged_decode(
            queries, keys, values, ends, contexts, blocks, case.scale, max_length=1,
            max_context=max(case.contexts), out=out,
        )  # fmt: skip
        assert_same_bits(out, want)


def test_tickets_are_zero_again() -> None:
    from mainspring.ops.cuda.paged_attention import tickets_per_sequence

    case = Case.random(128, torch.bfloat16, (8, 2))
    tickets = torch.zeros(len(CONTEXTS) * tickets_per_sequence(2, 4, 1), dtype=torch.int32, device=DEVICE)
    first, second = case.decode(tickets=tickets), case.decode(tickets=tickets)
    assert_same_bits(first, second)
    assert not tickets.any()


def test_a_graph_captured_for_longer_contexts_serves_shorter_ones() -> None:
    from mainspring.ops.cuda.paged_attention import paged_decode

    case = Case.random(128, torch.bfloat16, (8, 2))
    keys, values, tables = case.cache()
    queries, contexts, ends = case.q[case.rows()], ints(case.contexts), ends_of(case.lengths)
    out = torch.empty_like(queries)

    def call() -> None:
        paged_decode(
            queries,
            keys,
            values,
            ends,
            contexts,
            tables,
            case.scale,
            max_length=1,
            max_context=20000,
            out=out,
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    want = case.whole()
    for _ in range(2):
        out.fill_(math.nan)
        graph.replay()
        assert_same_bits(out, want)
    contexts.fill_(1)
    graph.replay()
    ones = case.v[torch.tensor([0, *accumulate(case.contexts)][:-1], device=DEVICE)]
    assert_same_bits(out, ones.repeat_interleave(4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "window", "softcap"), [(64, None, None), (128, 600, None), (128, None, 30.0)])
def test_an_fp8_cache(d: int, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    """Keys and values that e4m3 holds, with scales, against the formula on them; decode and prefill."""
    from mainspring.ops.triton.attention import attention

    case = Case.random(d, dtype, (8, 2), queries=2)
    stored = [x.to(torch.float8_e4m3fn) for x in (case.k, case.v)]
    scales = [torch.rand(2, device=DEVICE) + 0.3 for _ in range(2)]
    wide = [x.float() * scale[:, None] for x, scale in zip(stored, scales, strict=True)]
    keys, values, tables = Case(case.q, *(x.float() for x in stored), *list(vars(case).values())[3:]).cache()
    rows = case.q[case.rows()]
    arguments = (
        rows, keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn), ends_of(case.lengths), ints(case.contexts),
        tables, case.scale, window, softcap,
    )  # fmt: skip
    from mainspring.ops.cuda.paged_attention import paged_decode

    exact, _ = Case(case.q, *wide, *list(vars(case).values())[3:]).exact(window, softcap)
    for kernel in (paged_decode, attention):
        out = torch.full_like(rows, math.nan)
        kernel(*arguments, max_length=2, max_context=2300, out=out, k_scale=scales[0], v_scale=scales[1])
        assert (out - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_batch_of_prompts_and_single_tokens(dtype: torch.dtype) -> None:
    """The operation itself, block by block: every row as if it were alone."""
    from mainspring import ops

    lengths, contexts = (1, 700, 1, 3, 9), (800, 1300, 1, 520, 9)
    total = [-(-n // 16) for n in contexts]
    tables, first = [], 1
    for count in total:
        tables.append(list(range(first, first + count)))
        first += count
    torch.manual_seed(0)

    def fresh() -> KVCache:
        return KVCache.allocate(1, first, 16, 2, 64, dtype, DEVICE)

    past, cache, single = (
        torch.randn(3, 2, sum(contexts), 2, 64, device=DEVICE).bfloat16()[0],
        fresh(),
        fresh(),
    )
    q = torch.randn(sum(contexts), 8, 64, device=DEVICE).bfloat16()
    starts = [0, *accumulate(contexts)]

    def attend(cache: KVCache, which: Sequence[int], lengths: Sequence[int], ends: Sequence[int]) -> Tensor:
        batch = TokenBatch.paged(lengths, ends, [tables[s] for s in which], cache)
        rows = torch.cat(
            [
                torch.arange(starts[s] + end - n, starts[s] + end, device=DEVICE)
                for s, n, end in zip(which, lengths, ends, strict=True)
            ]
        )
        with torch.no_grad():
            return ops.attention(q[rows], past[0][rows], past[1][rows], batch, layer=0, scale=0.2)

    for s, (n, context) in enumerate(zip(lengths, contexts, strict=True)):
        if context > n:  # what was there before
            attend(cache, [s], [context - n], [context - n])
            attend(single, [s], [context - n], [context - n])
    together = attend(cache, range(5), lengths, contexts)
    alone = torch.cat([attend(single, [s], [lengths[s]], [contexts[s]]) for s in range(5)])
    assert_same_bits(together, alone)


def test_bad_input_is_refused() -> None:
    case = Case.random(64, torch.bfloat16, (8, 2), (20,))
    with pytest.raises(BackendError, match="scale must be above 0"):
        Case(*list(vars(case).values())[:-1], 0.0).decode()
    with pytest.raises(BackendError, match="multiple of 16"):
        Case.random(72, torch.bfloat16, (8, 2), (20,)).decode()
    with pytest.raises(BackendError, match="bfloat16 and float16"):
        Case.random(64, torch.float32, (8, 2), (20,)).decode()
    with pytest.raises(BackendError, match="blocks of a multiple of 16"):
        Case.random(64, torch.bfloat16, (8, 2), (20,), block_size=8).decode()
    with pytest.raises(BackendError, match="head sizes 64, 96, 128, not 256"):
        Case.random(256, torch.bfloat16, (8, 2), (20,)).prefill()
    with pytest.raises(BackendError, match="k_scale"):
        case.decode(k_scale=torch.ones(2, device=DEVICE), v_scale=torch.ones(2, device=DEVICE))
