"""Flash attention backward in plain Triton over packed sequences: the portable version.

Scores are recomputed from lse (Dao 2023, "FlashAttention-2", algorithm 2), with dS = P ∘ (dP - delta) and
delta = rowsum(dO ∘ O). One kernel takes a tile of keys and walks over the queries that see it (dK, dV), another a
tile of queries and walks over its keys (dQ). That is seven products where one kernel would need five, but no sum is
spread over programs: no atomics, no float32 copy of dQ, and the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.flash_forward import (
    Scores,
    Tile,
    checked,
    hopper_serves,
    load_rows,
    padded,
    precision,
    sequence_of,
    tanh,
)
from mainspring.ops.triton.support import on_device, require

if TYPE_CHECKING:
    from mainspring.ops.triton.flash_gluon_backward import HopperBackwardTiles


@dataclass(frozen=True)
class BackwardTiles:
    """The tiles of the two kernels. A tile's `rows` are queries and its `keys` are keys in both."""

    dkdv: Tile
    dq: Tile


def backward_tiles(dim: int, dtype: torch.dtype) -> BackwardTiles:
    """The tiles for a head size, already padded to a power of two."""
    if dtype == torch.float32:
        return BackwardTiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if dim <= 128:
        return BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    return BackwardTiles(Tile(32, 64, 8, 1), Tile(64, 32, 8, 1))


@triton.jit
def terms_of(start, s):
    """Where a sequence's row terms begin: at a multiple of 4, which is what a tensor descriptor can start at."""
    return ((start + 3) // 4 + s) * 4


@triton.jit(do_not_specialize=["num_seqs", "tokens", "pitch"])
def row_terms_kernel(
    out, dout, lse, terms, cu_q, num_seqs, tokens, pitch, out_stride, dout_stride, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What `row_terms` describes. Grid: (tiles of queries, heads)."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = sequence_of(cu_q, num_seqs, tile, ROWS)
    start = tl.load(cu_q + s)
    length = tl.load(cu_q + s + 1) - start
    row0 = (tile - (start // ROWS + s)) * ROWS
    if row0 >= length:
        return
    rows = row0 + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    o = load_rows(out, start, rows, length, head, dims, out_stride, HEAD_DIM)
    do = load_rows(dout, start, rows, length, head, dims, dout_stride, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    logarithm = tl.load(lse + head * tokens + start + rows, rows < length, 0.0)
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm * 1.4426950408889634)
    place = terms + head * pitch + terms_of(start, s) + rows
    tl.store(place, logarithm, rows < length)
    tl.store(place + tl.num_programs(1).to(tl.int64) * pitch, delta, rows < length)


@triton.jit
def _gradient_of_scores(
    scores, dp, logarithm, delta, seen, factor, inner, MASKED: tl.constexpr, SOFTCAP: tl.constexpr
):
    """(P, dS before `scale`) from q·k and dP; logarithm and delta broadcast against them."""
    if SOFTCAP:
        scores = tanh(scores * inner)
    p = tl.exp2(scores * factor - logarithm)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1.0 - scores * scores)
    return p, ds


@triton.jit
def _dkdv_block(
    keys, values, dk, dv, q, dout, terms, first, q_start, terms_start, length, lead, columns, head, dims, q_stride,
    dout_stride, plane, pitch, factor, inner, window, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries into dK and dV. Everything is transposed: [keys, queries]."""
    rows = first + tl.arange(0, ROWS)
    queries = load_rows(q, q_start, rows, length, head, dims, q_stride, HEAD_DIM)
    do = load_rows(dout, q_start, rows, length, head, dims, dout_stride, HEAD_DIM)
    place = terms + head.to(tl.int64) * pitch + terms_start + rows
    logarithm = tl.load(place, rows < length, float("inf"))  # so that rows that are not there have P = 0
    delta = tl.load(place + plane, rows < length, 0.0)
    seen = (columns >= 0)[:, None]
    if CAUSAL:
        seen = seen & (columns[:, None] <= lead + rows[None, :])
    if WINDOWED:
        seen = seen & (columns[:, None] > lead + rows[None, :] - window)
    scores = tl.dot(keys, queries.T, input_precision=PRECISION)
    dp = tl.dot(values, do.T, input_precision=PRECISION)
    p, ds = _gradient_of_scores(
        scores, dp, logarithm[None, :], delta[None, :], seen, factor, inner, MASKED, SOFTCAP
    )
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_seqs", "window", "group", "pitch"])
def dkdv_kernel(
    dout, q, k, v, terms, dk, dv, cu_q, cu_k, scale, factor, inner, window, num_seqs, pitch, dout_stride, q_stride,
    k_stride, v_stride, group, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys, key heads)."""
    tile = tl.program_id(0)  # under a causal mask the longest first
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    s = sequence_of(cu_k, num_seqs, tile, KEYS)
    k_start = tl.load(cu_k + s)
    count = tl.load(cu_k + s + 1) - k_start
    column0 = (tile - (k_start // KEYS + s)) * KEYS
    if column0 >= count:
        return
    q_start = tl.load(cu_q + s)
    length = tl.load(cu_q + s + 1) - q_start
    lead = count - length
    columns = column0 + tl.arange(0, KEYS)
    dims = tl.arange(0, DIM)
    keys = load_rows(k, k_start, columns, count, kv_head, dims, k_stride, HEAD_DIM)
    values = load_rows(v, k_start, columns, count, kv_head, dims, v_stride, HEAD_DIM)
    low = 0
    high = length
    full = 0  # from here on queries see the whole tile
    if CAUSAL:
        low = min(max(column0 - lead, 0) // ROWS * ROWS, length)
        full = min(max((column0 + KEYS - 1 - lead + ROWS - 1) // ROWS * ROWS, low), length)
    if WINDOWED:
        high = max(min(length, min(column0 + KEYS, count) - 1 + window - lead), low)
        full = high
    terms_start = terms_of(q_start, s)
    plane = pitch.to(tl.int64) * kv_heads * group
    grad_k = tl.zeros((KEYS, DIM), tl.float32)
    grad_v = tl.zeros((KEYS, DIM), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        for first in range(low, full, ROWS):
            grad_k, grad_v = _dkdv_block(
                keys, values, grad_k, grad_v, q, dout, terms, first, q_start, terms_start, length, lead, columns,
                head, dims, q_stride, dout_stride, plane, pitch, factor, inner, window, HEAD_DIM, ROWS, True, CAUSAL,
                WINDOWED, SOFTCAP, PRECISION,
            )  # fmt: skip
        for first in range(full, high, ROWS):
            grad_k, grad_v = _dkdv_block(
                keys, values, grad_k, grad_v, q, dout, terms, first, q_start, terms_start, length, lead, columns,
                head, dims, q_stride, dout_stride, plane, pitch, factor, inner, window, HEAD_DIM, ROWS, False, CAUSAL,
                WINDOWED, SOFTCAP, PRECISION,
            )  # fmt: skip
    offsets = ((k_start + columns).to(tl.int64) * kv_heads + kv_head)[:, None] * HEAD_DIM + dims[None, :]
    inside = (columns < count)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dk + offsets, (grad_k * scale).to(dk.dtype.element_ty), inside)
    tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), inside)


@triton.jit
def _dq_block(
    queries, do, logarithm, delta, dq, k, v, first, k_start, count, positions, kv_head, dims, k_stride, v_stride,
    factor, inner, window, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into dQ."""
    columns = first + tl.arange(0, KEYS)
    keys = load_rows(k, k_start, columns, count, kv_head, dims, k_stride, HEAD_DIM)
    values = load_rows(v, k_start, columns, count, kv_head, dims, v_stride, HEAD_DIM)
    seen = (columns < count)[None, :]
    if CAUSAL:
        seen = seen & (columns[None, :] <= positions[:, None])
    if WINDOWED:
        seen = seen & (columns[None, :] > positions[:, None] - window)
    scores = tl.dot(queries, keys.T, input_precision=PRECISION)
    dp = tl.dot(do, values.T, input_precision=PRECISION)
    _, ds = _gradient_of_scores(
        scores, dp, logarithm[:, None], delta[:, None], seen, factor, inner, MASKED, SOFTCAP
    )
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_seqs", "window", "group", "pitch"])
def dq_kernel(
    dout, q, k, v, terms, dq, cu_q, cu_k, scale, factor, inner, window, num_seqs, pitch, dout_stride, q_stride,
    k_stride, v_stride, group, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, query heads)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest first
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    s = sequence_of(cu_q, num_seqs, tile, ROWS)
    start = tl.load(cu_q + s)
    length = tl.load(cu_q + s + 1) - start
    row0 = (tile - (start // ROWS + s)) * ROWS
    if row0 >= length:
        return
    k_start = tl.load(cu_k + s)
    count = tl.load(cu_k + s + 1) - k_start
    lead = count - length
    rows = row0 + tl.arange(0, ROWS)
    positions = lead + rows
    dims = tl.arange(0, DIM)
    queries = load_rows(q, start, rows, length, head, dims, q_stride, HEAD_DIM)
    do = load_rows(dout, start, rows, length, head, dims, dout_stride, HEAD_DIM)
    place = terms + head.to(tl.int64) * pitch + terms_of(start, s) + rows
    logarithm = tl.load(place, rows < length, float("inf"))
    delta = tl.load(place + pitch.to(tl.int64) * heads, rows < length, 0.0)
    low = 0
    high = count
    full = count // KEYS * KEYS  # blocks before it are seen whole
    if CAUSAL:
        high = max(min(count, lead + min(row0 + ROWS, length)), 0)
        full = max(min(full, (lead + row0 + 1) // KEYS * KEYS), 0)
    if WINDOWED:
        low = min(max(lead + row0 + 1 - window, 0) // KEYS * KEYS, high)
        full = low
    grad = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(low, full, KEYS):
        grad = _dq_block(
            queries, do, logarithm, delta, grad, k, v, first, k_start, count, positions, head // group, dims, k_stride,
            v_stride, factor, inner, window, HEAD_DIM, KEYS, False, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
    for first in range(full, high, KEYS):
        grad = _dq_block(
            queries, do, logarithm, delta, grad, k, v, first, k_start, count, positions, head // group, dims, k_stride,
            v_stride, factor, inner, window, HEAD_DIM, KEYS, True, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
    offsets = ((start + rows).to(tl.int64) * heads + head)[:, None] * HEAD_DIM + dims[None, :]
    inside = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(dq + offsets, (grad * scale).to(dq.dtype.element_ty), inside)


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    tiles: BackwardTiles | HopperBackwardTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. The other arguments are those of `flash_attention_forward`, or its results.

    Args:
        dout: [T, Hq, D], the gradient of out, in q's dtype.
        out: [T, Hq, D], the forward pass's result.
        lse: [Hq, T] float32, likewise.
        deterministic: whether the same inputs must give the same bits. They always do.
        tiles: other tiles than the table's (tests and benchmarks).

    Returns:
        dq [T, Hq, D], dk [Tk, Hkv, D] and dv [Tk, Hkv, D] in q's dtype. Queries that see no key have zero gradient
        and give none, as keys that no query sees.

    Raises:
        BackendError: a dtype, shape or number that the kernels do not take.
    """
    name = "flash_attention_backward"
    q, k, v = checked(name, q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap)
    dout, out = checked_results(name, q, dout, out, lse)
    d, heads, kv_heads = q.shape[2], q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dim = padded(d)
    scores, window, num_seqs = Scores.of(scale, softcap), window or 0, cu_q.shape[0] - 1
    constants = {
        "HEAD_DIM": d, "DIM": dim, "CAUSAL": causal, "WINDOWED": window > 0, "SOFTCAP": bool(softcap),
        "PRECISION": precision(q.dtype),
    }  # fmt: skip
    strides = (dout.stride(0), q.stride(0), k.stride(0), v.stride(0))
    with on_device(q):
        terms = row_terms(out, dout, lse, cu_q)
        if not isinstance(tiles, BackwardTiles) and hopper_serves(q, k, v, dout):
            from mainspring.ops.triton.flash_gluon_backward import launch_backward

            launch_backward(
                dout, q, k, v, terms, dq, dk, dv, cu_q, cu_k, max_q=max_q, max_k=max_k, scale=scale,
                factor=scores.factor, inner=scores.inner, causal=causal, window=window, tiles=tiles,
            )  # fmt: skip
            return dq, dk, dv
        if not isinstance(tiles, BackwardTiles):
            tiles = backward_tiles(dim, q.dtype)
        numbers = (
            scale,
            scores.factor,
            scores.inner,
            window,
            num_seqs,
            terms.shape[2],
            *strides,
            heads // kv_heads,
        )
        if k.shape[0]:
            tile = tiles.dkdv
            dkdv_kernel[(k.shape[0] // tile.keys + num_seqs, kv_heads)](
                dout, q, k, v, terms, dk, dv, cu_q, cu_k, *numbers, ROWS=tile.rows, KEYS=tile.keys, **constants,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        if q.shape[0]:
            tile = tiles.dq
            dq_kernel[(q.shape[0] // tile.rows + num_seqs, heads)](
                dout, q, k, v, terms, dq, cu_q, cu_k, *numbers, ROWS=tile.rows, KEYS=tile.keys, **constants,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return dq, dk, dv


def row_terms(out: Tensor, dout: Tensor, lse: Tensor, cu_q: Tensor) -> Tensor:
    """What a row's gradient needs, [2, Hq, pitch] float32: lse · log2(e), +inf where it is -inf, and rowsum(dO ∘ O).

    A sequence's terms begin at `terms_of` its first token and itself; what lies between sequences is not written.
    """
    tokens, heads, d = out.shape
    num_seqs, rows = cu_q.shape[0] - 1, 64
    pitch = (tokens + 3) // 4 * 4 + 4 * num_seqs
    terms = torch.empty((2, heads, pitch), dtype=torch.float32, device=out.device)
    if tokens:
        row_terms_kernel[(tokens // rows + num_seqs, heads)](
            out, dout, lse, terms, cu_q, num_seqs, tokens, pitch, out.stride(0), dout.stride(0),
            HEAD_DIM=d, DIM=padded(d), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return terms


def checked_results(name: str, q: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dout and out with a token's heads contiguous, or a BackendError that says what does not fit."""
    tokens, heads, d = q.shape
    require(
        name,
        dout.shape == out.shape == q.shape and dout.dtype is out.dtype is q.dtype,
        f"dout {dout.dtype} {tuple(dout.shape)} and out {out.dtype} {tuple(out.shape)} do not fit q {q.dtype} "
        f"{tuple(q.shape)}",
    )
    require(
        name,
        lse.shape == (heads, tokens) and lse.dtype is torch.float32 and lse.is_contiguous(),
        f"lse must be a contiguous [{heads}, {tokens}] float32, not {tuple(lse.shape)} of {lse.dtype}",
    )
    dout, out = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (dout, out))
    return dout, out
