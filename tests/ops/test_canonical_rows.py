"""Canonical order: a row's bits are its own, from one row to 16,384, for every operation between tokens and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.ops import LOCKSTEP, KVCache, Policy, TokenBatch

CPU_POLICIES = [LOCKSTEP, Policy("lockstep", "reference")]
CPU_ROWS = (1, 2, 3, 7, 16, 17, 63, 256, 700)
GPU_ROWS = (1, 2, 8, 17, 64, 65, 128, 511, 1024, 4096, 16384)
WIDTH, VOCAB = 256, 1000
DTYPES = [torch.float32, torch.bfloat16]

Rows = Callable[[Tensor, Tensor, Policy], Tensor | tuple[Tensor, ...]]


def operations(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Rows]]:
    """(name, function of rows [M, WIDTH] and targets [M])."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    square, bias, norm, vocabulary = normal(96, WIDTH), normal(96), normal(WIDTH), normal(VOCAB, WIDTH)
    gate_up = normal(64, WIDTH)
    yield "linear", lambda x, t, p: ops.linear(x, square, bias, policy=p)
    yield "linear_swiglu", lambda x, t, p: ops.linear_swiglu(x, gate_up, policy=p)
    yield "linear_tp_invariant", lambda x, t, p: ops.linear_tp_invariant(x, square, bias, policy=p)
    yield "rms_norm", lambda x, t, p: ops.rms_norm(x, norm, 1e-5, policy=p)
    yield "add_rms_norm", lambda x, t, p: ops.add_rms_norm(x, x.flip(1).contiguous(), norm, 1e-5, policy=p)
    yield "swiglu", lambda x, t, p: ops.swiglu(x, policy=p)
    yield (
        "token_log_probs",
        lambda x, t, p: ops.token_log_probs_and_entropy(x.float(), t % WIDTH, 0.7, policy=p),
    )
    yield "linear_log_probs", lambda x, t, p: ops.linear_log_probs(x, vocabulary, t, policy=p)
    yield "cross_entropy", lambda x, t, p: ops.cross_entropy(x, vocabulary, t, reduction="none", policy=p)


NAMES = [name for name, _ in operations(torch.float32, "cpu")]


def check_rows(
    name: str, dtype: torch.dtype, device: str, counts: tuple[int, ...], policies: list[Policy]
) -> None:
    run = dict(operations(dtype, device))[name]
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(counts[-1], WIDTH, generator=generator) * 2).to(device, dtype)
    targets = torch.randint(0, VOCAB, (counts[-1],), generator=generator).to(device)
    for policy in policies:

        def parts(first: int, count: int, policy: Policy = policy) -> tuple[Tensor, ...]:
            found = run(x[first : first + count], targets[first : first + count], policy)
            return found if isinstance(found, tuple) else (found,)

        whole = parts(0, counts[-1])
        for count in counts[:-1]:
            for first in (0, counts[-1] - count):
                for some, all_of_them in zip(parts(first, count), whole, strict=True):
                    assert torch.equal(some, all_of_them[first : first + count]), (policy, first, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(name: str, dtype: torch.dtype) -> None:
    check_rows(name, dtype, "cpu", CPU_ROWS, CPU_POLICIES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_from_1_row_to_16384(name: str, dtype: torch.dtype) -> None:
    check_rows(name, dtype, "cuda", GPU_ROWS, [LOCKSTEP])


def check_attention(
    length: int, d: int, dtype: torch.dtype, device: str, window: int | None, policy: Policy
) -> None:
    generator = torch.Generator().manual_seed(3)

    def heads(count: int) -> Tensor:
        return torch.randn(length + 37, count, d, generator=generator).to(device, dtype)

    q, k, v = heads(4), heads(2), heads(2)

    def attend(some: slice, batch: TokenBatch) -> Tensor:
        return ops.attention(
            q[some], k[some], v[some], batch, layer=0, scale=0.3, window=window, policy=policy
        )

    whole = attend(slice(0, length), TokenBatch.packed([length], device))
    beside_another = attend(slice(0, length + 37), TokenBatch.packed([length, 37], device))
    assert torch.equal(beside_another[:length], whole)
    blocks = -(-length // 16)
    table = (torch.randperm(blocks, generator=generator) + 1).tolist()
    cache = KVCache.allocate(1, blocks + 1, 16, 2, d, dtype, device)
    in_chunks, first = [], 0
    while first < length:  # chunks of a prompt, which grow
        count = min(max(1, first), length - first)
        batch = TokenBatch.paged([count], [first + count], [table], cache)
        in_chunks.append(attend(slice(first, first + count), batch))
        first += count
    assert torch.equal(torch.cat(in_chunks), whole)
    for count in (1, 2, 100):  # decoding, drafts and a last chunk
        batch = TokenBatch.paged([count], [length], [table], cache)
        assert torch.equal(attend(slice(length - count, length), batch), whole[length - count :])


@pytest.mark.parametrize("policy", CPU_POLICIES, ids=lambda p: str(p.backend))
@pytest.mark.parametrize(("length", "window"), [(600, None), (333, 70)])
def test_a_query_has_the_same_bits_in_prefill_chunks_and_decode(
    length: int, window: int | None, policy: Policy
) -> None:
    check_attention(length, 16, torch.float32, "cpu", window, policy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "window"), [(64, None), (128, None), (128, 3000), (96, None), (256, None)])
def test_a_query_has_the_same_bits_among_16384_keys(d: int, window: int | None, dtype: torch.dtype) -> None:
    check_attention(16384, d, dtype, "cuda", window, LOCKSTEP)
