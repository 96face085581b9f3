"""y = x Wᵀ in canonical order against cuBLAS, at the (N, K) of Qwen3-0.6B and 8B; its form for tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F

from kernel_groups.timing import ROTATED_BYTES, Row, randn, times
from mainspring.ops import linear
from mainspring.ops.linear_tp_invariant import linear_tp_invariant

# Fused projections of a layer: qkv, output, gate and up, down.
SHAPES = (
    (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072),
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288),
)  # fmt: skip
ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
SEGMENTED = ((4096, 12288), (4096, 4096))


def linear_rows() -> Iterator[Row]:
    for n, k in SHAPES:
        count = max(1, min(32, ROTATED_BYTES // (n * k * 2)))
        weights = [randn(n, k, scale=0.02) for _ in range(count)]
        for m in ROWS:
            x = randn(m, k)
            used = weights[:4] if m > 1024 else weights
            products: list[Callable[..., object]] = [linear, F.linear]
            if (n, k) in SEGMENTED:
                products.append(linear_tp_invariant)
            found = times([[partial(p, x, w) for w in used] for p in products], replays=7 if m > 1024 else 11)
            name, flop = f"M={m} N={n} K={k}", 2e-9 * m * n * k
            yield Row("linear", name, flop, "GFLOP", *found[0], *found[1], "cuBLAS")
            if len(found) > 2:
                yield Row(
                    "linear", f"tp_invariant {name}", flop, "GFLOP", *found[2], *found[0], "own canonical"
                )
