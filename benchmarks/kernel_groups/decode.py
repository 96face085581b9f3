"""Paged decode: keys and values read, as a share of the bandwidth of a copy; CUDA C++ against Triton."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_groups.timing import Row, randn, times
from mainspring.ops.cuda.paged_attention import paged_decode, tickets_per_sequence
from mainspring.ops.triton.attention import attention

KV_HEADS, GROUP, BLOCK = 8, 4, 16
LAYERS = 3  # of a step, each with a cache of its own, as in an engine's graph
FP8 = torch.float8_e4m3fn


def decode_rows() -> Iterator[Row]:
    """A step of several layers; blocks of 16 keys in random order, 32 query and 8 key heads."""
    for d, (seqs, context) in itertools.product((128, 64), ((64, 2048), (256, 600), (8, 8192), (1, 32768))):
        blocks_each = -(-context // BLOCK)
        blocks = seqs * blocks_each
        tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(seqs, blocks_each)
        q = randn(seqs, KV_HEADS * GROUP, d)
        ends = torch.arange(seqs + 1, dtype=torch.int32, device="cuda")
        contexts = torch.full((seqs,), context, dtype=torch.int32, device="cuda")
        tickets = torch.zeros(
            seqs * tickets_per_sequence(KV_HEADS, GROUP, 1), dtype=torch.int32, device="cuda"
        )
        ones = torch.ones(KV_HEADS, device="cuda")
        cases: dict[str, list[Callable[[], object]]] = {"cuda": [], "triton": [], "cuda fp8": []}
        rest = ends, contexts, tables, d**-0.5
        lengths = {"max_length": 1, "max_context": context}
        for _ in range(LAYERS):
            k, v = (randn(blocks, BLOCK, KV_HEADS, d) for _ in range(2))
            # Keys of its own for each contender: ours leave the L2 cache first and would find in it what another left.
            own = k.clone(), v.clone()
            cases["cuda"].append(partial(paged_decode, q, k, v, *rest, **lengths, tickets=tickets))
            cases["triton"].append(partial(attention, q, *own, *rest, **lengths))
            cases["cuda fp8"].append(
                partial(
                    paged_decode, q, k.to(FP8), v.to(FP8), *rest, **lengths, tickets=tickets, k_scale=ones,
                    v_scale=ones,
                )
            )  # fmt: skip
        found = dict(zip(cases, times(list(cases.values()), replays=11), strict=True))
        amount = 2 * seqs * context * KV_HEADS * d * 2 / 1e9
        name = f"d{d} {seqs}x{context}"
        yield Row("decode", f"cuda {name}", amount, "GB", *found["cuda"], *found["triton"], "own Triton")
        yield Row(
            "decode", f"cuda fp8 {name}", amount / 2, "GB", *found["cuda fp8"], *found["cuda"], "own bf16"
        )
