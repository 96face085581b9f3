"""Grouped linear of experts and its gradients against torch.nn.functional.grouped_mm, rows uneven among experts;
top-k routing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kernel_groups.timing import Row, randn, row, times
from mainspring.ops import LOCKSTEP, grouped_linear
from mainspring.ops.grouped_linear import GROUPED_LINEAR_BACKWARD
from mainspring.ops.routing import route

TOKENS = 8192
# (experts, K, N, experts a token): the first matrix of an expert's MLP
SHAPES = (
    (8, 2048, 5632, 2),
    (16, 2048, 2816, 2),
    (32, 2048, 2816, 4),
    (64, 2048, 1408, 6),
    (64, 2048, 1408, 8),
)


def expert_rows() -> Iterator[Row]:
    for experts, k, n, top in SHAPES:
        tokens = randn(TOKENS, k)
        logits = randn(TOKENS, experts, dtype=torch.float32) + 0.5 * randn(1, experts, dtype=torch.float32)
        routing = route(logits, top, normalise=True)
        weight = randn(experts, n, k, scale=0.02)
        x = tokens[routing.tokens]
        transposed, ends = weight.transpose(1, 2), routing.offsets[1:]
        found = times(
            [
                [partial(grouped_linear, x, weight, routing.offsets)],
                [partial(grouped_linear, tokens, weight, routing.offsets, gather=routing)],
                [partial(F.grouped_mm, x, transposed, offs=ends)],
                [lambda r=routing, w=transposed, e=ends, t=tokens: F.grouped_mm(t[r.tokens], w, offs=e)],
            ],
            replays=9,
        )
        name, flop = f"{experts} experts top {top} K={k} N={n}", 2e-9 * TOKENS * top * k * n
        yield Row("experts", name, flop, "GFLOP", *found[0], *found[2], "grouped_mm")
        yield Row("experts", f"{name} gathered", flop, "GFLOP", *found[1], *found[3], "index + grouped_mm")
        grad = randn(TOKENS * top, n)
        ours = GROUPED_LINEAR_BACKWARD.select(x, LOCKSTEP)
        given = grad, x, weight, routing.offsets, None, None
        found = times(
            [
                [partial(ours, *given, needs_x=True, needs_weight=False)],
                [partial(F.grouped_mm, grad, weight, offs=ends)],
                [partial(ours, *given, needs_x=False, needs_weight=True)],
                [partial(F.grouped_mm, x.t(), grad, offs=ends)],
            ],
            replays=9,
        )
        yield Row("experts", f"{name} dX", flop, "GFLOP", *found[0], *found[1], "grouped_mm")
        yield Row("experts", f"{name} dW", flop, "GFLOP", *found[2], *found[3], "grouped_mm")
        yield row(
            "experts", f"routing of {TOKENS} tokens to {top} of {experts}", TOKENS * experts * 4e-9, "GB",
            [lambda z=logits, t=top: route(z, t, normalise=True)],
        )  # fmt: skip
