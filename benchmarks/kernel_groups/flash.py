"""Attention of whole sequences, forward and backward: CUDA C++ and Triton against torch's SDPA, canonical order against
the free order of the same kernel, and chunks of prompts over a paged cache.

B · S = 16,384 tokens, H · D = 2,048; causal FLOPs are counted at half, a backward pass at 2.5 forward passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_groups.timing import Calls, Row, randn, times
from mainspring.errors import BackendError
from mainspring.ops.cuda.flash_forward import flash_attention_forward
from mainspring.ops.cuda.paged_prefill import paged_prefill
from mainspring.ops.flash_attention import flash_attention_backward_op, flash_attention_op
from mainspring.ops.triton.attention import attention

TOKENS, WIDTH = 16384, 2048
GRID = tuple(itertools.product((128, 64), (512, 2048, 8192, 16384), (False, True)))
BLOCK = 16  # keys of a block of the paged cache, which lie in random order
OURS = ("cuda", "triton")
CANONICAL, PAGED = "cuda, canonical", "cuda, paged"
PEERS = ("flash2", "cuDNN")
aten: Any = torch.ops.aten


def inputs(d: int, s: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(packed q, k, v and gradient [T, H, D]; the same as [B, H, S, D]; boundaries)."""
    packed = [randn(TOKENS, WIDTH // d, d) for _ in range(4)]
    dense = [x.view(TOKENS // s, s, WIDTH // d, d).transpose(1, 2) for x in packed]
    return packed, dense, torch.arange(0, TOKENS + 1, s, dtype=torch.int32, device="cuda")


def flops(s: int, causal: bool) -> float:
    """GFLOP of a forward pass."""
    return 4e-9 * TOKENS * s * WIDTH / (2 if causal else 1)


def available(run: Callable[[], object]) -> bool:
    """Whether this machine serves the call (a machine without nvcc has no CUDA C++ kernels)."""
    try:
        run()
    except BackendError as error:
        print(error)
        return False
    return True


def forward_rows() -> Iterator[Row]:
    for d, s, causal in GRID:
        (q, k, v, _), (dq, dk, dv, _), cu = inputs(d, s)

        def ours(backend: str, q: Tensor = q, k: Tensor = k, v: Tensor = v, cu: Tensor = cu) -> Calls:
            options = (s, s, d**-0.5, causal, 0, 0.0, False, backend)  # noqa: B023 - called at once
            return [partial(flash_attention_op, q, k, v, cu, cu, *options)]

        cases: dict[str, Calls] = {name: ours(name) for name in OURS if available(ours(name)[0])}
        if "cuda" in cases:
            cases[CANONICAL] = [
                partial(
                    flash_attention_forward, q, k, v, cu, cu, max_q=s, max_k=s, scale=d**-0.5, causal=causal,
                    canonical=True,
                )
            ]  # fmt: skip
        if causal:
            lengths = torch.full((TOKENS // s,), s, dtype=torch.int32, device="cuda")
            longest = {"max_length": s, "max_context": s}
            cases["triton, canonical"] = [
                partial(attention, q, k, v, cu, lengths, None, d**-0.5, **longest, split=False)
            ]
            if "cuda" in cases:
                tables = (
                    torch.randperm(TOKENS // BLOCK, device="cuda")
                    .to(torch.int32)
                    .view(TOKENS // s, s // BLOCK)
                )
                caches = [x.view(TOKENS // BLOCK, BLOCK, WIDTH // d, d) for x in (k, v)]
                cases[PAGED] = [partial(paged_prefill, q, *caches, cu, lengths, tables, d**-0.5, **longest)]
        cases["flash2"] = [partial(aten._scaled_dot_product_flash_attention, dq, dk, dv, 0.0, causal)]
        cases["cuDNN"] = [
            partial(aten._scaled_dot_product_cudnn_attention, dq, dk, dv, None, True, 0.0, causal)
        ]
        yield from compare("forward", f"d{d} {'causal' if causal else 'full'} S={s}", flops(s, causal), cases)


def backward_rows() -> Iterator[Row]:
    for d, s, causal in GRID:
        (q, k, v, g), (dq, dk, dv, dg), cu = inputs(d, s)
        cases: dict[str, Calls] = {}
        for name in OURS:
            options = (s, s, d**-0.5, causal, 0, 0.0)
            try:
                out, lse = flash_attention_op(q, k, v, cu, cu, *options, False, name)
            except BackendError as error:
                print(error)
                continue
            for label, deterministic in ((name, False), (f"{name}, deterministic", True)):
                cases[label] = [
                    partial(
                        flash_attention_backward_op, g, q, k, v, out, lse, cu, cu, *options, deterministic, name
                    )
                ]  # fmt: skip
        o, sums, cu_q, cu_k, mq, mk, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            dq, dk, dv, 0.0, causal
        )
        cases["flash2"] = [
            partial(
                aten._scaled_dot_product_flash_attention_backward, dg, dq, dk, dv, o, sums, cu_q, cu_k, mq, mk, 0.0,
                causal, seed, offset,
            )
        ]  # fmt: skip
        o, sums, cu_q, cu_k, mq, mk, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            dq, dk, dv, None, True, 0.0, causal
        )
        cases["cuDNN"] = [
            partial(
                aten._scaled_dot_product_cudnn_attention_backward, dg, dq, dk, dv, o, sums, seed, offset, None, cu_q,
                cu_k, mq, mk, 0.0, causal,
            )
        ]  # fmt: skip
        yield from compare(
            "backward", f"d{d} {'causal' if causal else 'full'} S={s}", 2.5 * flops(s, causal), cases
        )


def compare(group: str, name: str, amount: float, cases: dict[str, Calls]) -> Iterator[Row]:
    """Every case of ours against both peers; what is in canonical order against our own free order as well."""
    found = dict(zip(cases, times(list(cases.values()), replays=9), strict=True))
    for label in cases:
        if label in PEERS:
            continue
        for peer in PEERS:
            yield Row(group, f"{label} {name}", amount, "GFLOP", *found[label], *found[peer], peer)
        if label in (CANONICAL, PAGED):
            yield Row(
                group, f"{label} {name}", amount, "GFLOP", *found[label], *found["cuda"], "own free order"
            )
