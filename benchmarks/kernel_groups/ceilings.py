"""What this GPU can do at most: a copy and a large product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernel_groups.timing import BF16, Row, randn, row


def ceiling_rows() -> Iterator[Row]:
    source, target = randn(1 << 30), torch.empty(1 << 30, device="cuda", dtype=BF16)
    yield row(
        "ceiling",
        "device copy (negation), 2 GiB each way",
        4 * (1 << 30) / 1e9,
        "GB",
        [lambda: torch.neg(source, out=target)],  # a kernel: a graph's copy node takes a slower way
    )
    a, b = randn(8192, 8192), randn(8192, 8192)
    yield row("ceiling", "bf16 GEMM 8192³ (cuBLAS)", 2 * 8192**3 / 1e9, "GFLOP", [lambda: F.linear(a, b)])
