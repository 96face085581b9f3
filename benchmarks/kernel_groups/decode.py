"""Paged decode: keys and values read, as a share of the bandwidth of a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kernel_groups.timing import Calls, Row, randn, times
from mainspring.ops.triton import attention as triton_attention


def decode_rows() -> Iterator[Row]:
    """Paged, blocks of 16 in random order, 32 query and 8 key heads of 128 (and 32, 8 of 64)."""
    tile = triton_attention.Tile
    others = {64: (tile(64, 64, 4, 3),), 128: (tile(64, 64, 4, 4), tile(64, 128, 8, 2), tile(64, 128, 4, 2))}
    for d, (seqs, context) in itertools.product((128, 64), ((64, 2048), (256, 600), (8, 8192), (1, 32768))):
        blocks_each = -(-context // 16)
        blocks = seqs * blocks_each
        k, v = randn(blocks, 16, 8, d), randn(blocks, 16, 8, d)
        tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(seqs, blocks_each)
        q = randn(seqs, 32, d)
        ends, contexts = (
            torch.arange(seqs + 1, dtype=torch.int32, device="cuda"),
            torch.full((seqs,), context, dtype=torch.int32, device="cuda"),
        )

        def ours(
            tile: triton_attention.Tile | None = None, q: Tensor = q, k: Tensor = k, v: Tensor = v,
            ends: Tensor = ends, contexts: Tensor = contexts, tables: Tensor = tables, context: int = context,
        ) -> Calls:  # fmt: skip
            return [
                lambda: triton_attention.attention(
                    q, k, v, ends, contexts, tables, 0.1, max_length=1, max_context=context, tile=tile
                )
            ]

        amount = 2 * seqs * context * 8 * d * 2 / 1e9
        found = times([ours(), *(ours(t) for t in others[d])], replays=11)
        yield Row("decode", f"d{d} {seqs}x{context}", amount, "GB", *found[0])
        for t, figures in zip(others[d], found[1:], strict=True):
            name = f"d{d} {seqs}x{context} (keys {t.keys}, {t.warps} warps, {t.stages} stages)"
            yield Row("decode", name, amount, "GB", *figures)
