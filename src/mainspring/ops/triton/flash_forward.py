"""Flash attention forward in plain Triton over packed sequences, free order of sums: the portable version.

A program takes a tile of queries of one head and walks over the keys it sees with an online softmax (Dao 2023,
"FlashAttention-2", algorithm 1). Blocks that every row sees whole are walked without a mask.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import check_dtype, on_device, require

if TYPE_CHECKING:
    from mainspring.ops.triton.flash_gluon import HopperTile

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a block, warps of a program, and how many blocks are loaded ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


def forward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a head size, already padded to a power of two."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if dim <= 64:
        return Tile(128, 64, 4, 3)
    if dim <= 128:
        return Tile(128, 64, 8, 3)
    return Tile(64, 64, 8, 2)


@dataclass(frozen=True)
class Scores:
    """How a product q·k becomes a score: x · factor, or cap · tanh(x · inner), both in powers of two."""

    factor: float  # of what the kernel exponentiates: exp2(factor · x)
    inner: float  # of the product within tanh; 0 without a cap

    @staticmethod
    def of(scale: float, softcap: float | None) -> Scores:
        """scale, softcap: as in `flash_reference.forward`."""
        if softcap:
            return Scores(softcap * LOG2_E, scale / softcap)
        return Scores(scale * LOG2_E, 0.0)


@triton.jit
def sequence_of(cu, num_seqs, tile, ROWS: tl.constexpr):
    """The sequence that owns a tile: sequence s owns tiles from floor(cu[s] / ROWS) + s on."""
    low, high = 0, num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def tanh(x):
    """By one exponential and one division: exact to the last bits of 1 for any finite x."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))


@triton.jit
def load_rows(source, start, rows, length, head, dims, stride, HEAD_DIM: tl.constexpr):
    """Rows of a packed [T, H, HEAD_DIM] and one head, zeros outside: [rows, dims]."""
    offsets = (start + rows).to(tl.int64)[:, None] * stride + head * HEAD_DIM + dims[None, :]
    return tl.load(source + offsets, (rows < length)[:, None] & (dims < HEAD_DIM)[None, :], 0.0)


@triton.jit
def _block(
    queries, acc, peak, total, k, v, first, k_start, keys, positions, kv_head, dims, k_stride, v_stride, factor,
    inner, window, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into a row's state (acc, peak, total)."""
    columns = first + tl.arange(0, KEYS)
    block = load_rows(k, k_start, columns, keys, kv_head, dims, k_stride, HEAD_DIM)
    scores = tl.dot(queries, block.T, input_precision=PRECISION)
    if SOFTCAP:
        scores = tanh(scores * inner)
    if MASKED:
        seen = (columns < keys)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= positions[:, None])
        if WINDOWED:
            seen = seen & (columns[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores * factor - (safe * factor)[:, None])
    shrink = tl.exp2((peak - safe) * factor)
    total = total * shrink + tl.sum(weights, 1)
    values = load_rows(v, k_start, columns, keys, kv_head, dims, v_stride, HEAD_DIM)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit(do_not_specialize=["num_seqs", "tokens", "window", "group"])
def forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, factor, inner, window, num_seqs, tokens, q_stride, k_stride, v_stride, group,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
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
    keys = tl.load(cu_k + s + 1) - k_start
    lead = keys - length  # position of the first query
    rows = row0 + tl.arange(0, ROWS)
    positions = lead + rows
    dims = tl.arange(0, DIM)
    queries = load_rows(q, start, rows, length, head, dims, q_stride, HEAD_DIM)
    low = 0
    high = keys
    full = keys // KEYS * KEYS  # blocks before it are seen whole
    if CAUSAL:
        high = max(min(keys, lead + min(row0 + ROWS, length)), 0)
        full = max(min(full, (lead + row0 + 1) // KEYS * KEYS), 0)
    if WINDOWED:
        low = min(max(lead + row0 + 1 - window, 0) // KEYS * KEYS, high)
        full = low
    acc = tl.zeros((ROWS, DIM), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(low, full, KEYS):
        acc, peak, total = _block(
            queries, acc, peak, total, k, v, first, k_start, keys, positions, head // group, dims, k_stride, v_stride,
            factor, inner, window, HEAD_DIM, KEYS, False, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
    for first in range(full, high, KEYS):
        acc, peak, total = _block(
            queries, acc, peak, total, k, v, first, k_start, keys, positions, head // group, dims, k_stride, v_stride,
            factor, inner, window, HEAD_DIM, KEYS, True, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    offsets = ((start + rows).to(tl.int64) * heads + head)[:, None] * HEAD_DIM + dims[None, :]
    inside = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + offsets, (acc / total[:, None]).to(out.dtype.element_ty), inside)
    logarithm = tl.where(empty, float("-inf"), (peak * factor + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + head.to(tl.int64) * tokens + start + rows, logarithm, rows < length)


def flash_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    tile: Tile | HopperTile | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(s) v for every sequence; s, the mask and the lengths as in `flash_reference.forward`.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided. D is a multiple of 8, at most 256.
            Finite, as k and v are.
        k: [Tk, Hkv, D]; Hkv divides Hq.
        v: likewise.
        cu_q: [S + 1] int32, ascending from 0 to T.
        cu_k: [S + 1] int32, ascending from 0 to Tk.
        max_q: the most queries of a sequence, or more; trusted, as the contents of cu_q and cu_k are.
        max_k: the most keys of a sequence, or more; likewise.
        scale: factor of the scores, above 0.
        causal: whether a query sees no key after its position.
        window: sliding window in keys, or None or 0 for all.
        softcap: bound of the scores, or None or 0 for none.
        tile: another tile than the table's (tests and benchmarks).

    Returns:
        out: [T, Hq, D] in q's dtype; zeros where a query sees no key.
        lse: [Hq, T] float32, the natural logarithm of the sum of exp(s); -inf where a query sees no key.

    Raises:
        BackendError: a dtype, shape or number that the kernel does not take.
    """
    q, k, v = checked("flash_attention_forward", q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap)
    tokens, heads, d = q.shape
    out = torch.empty((tokens, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    dim = padded(d)
    scores, window, num_seqs = Scores.of(scale, softcap), window or 0, cu_q.shape[0] - 1
    if not isinstance(tile, Tile) and hopper_serves(q, k, v):
        from mainspring.ops.triton.flash_gluon_forward import launch_forward

        with on_device(q):
            launch_forward(
                q, k, v, out, lse, cu_q, cu_k, max_q=max_q, max_k=max_k, factor=scores.factor, inner=scores.inner,
                causal=causal, window=window, tile=tile,
            )  # fmt: skip
        return out, lse
    if not isinstance(tile, Tile):
        tile = forward_tile(dim, q.dtype)
    with on_device(q):
        forward_kernel[(tokens // tile.rows + num_seqs, heads)](
            q, k, v, out, lse, cu_q, cu_k, scores.factor, scores.inner, window, num_seqs, tokens, q.stride(0),
            k.stride(0), v.stride(0), heads // k.shape[1], HEAD_DIM=d, DIM=dim, ROWS=tile.rows, KEYS=tile.keys,
            CAUSAL=causal, WINDOWED=window > 0, SOFTCAP=bool(softcap), PRECISION=precision(q.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def hopper_serves(q: Tensor, *others: Tensor) -> bool:
    """Whether the kernels for Hopper take such tensors [T, H, D]. Older Tritons have no Gluon to write them in."""
    if not q.is_cuda or importlib.util.find_spec("triton.experimental.gluon") is None:
        return False
    from mainspring.ops.triton.flash_gluon import serves

    return serves(q, *others)


def padded(head_dim: int) -> int:
    """The size of a head in a tile: a power of two of at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How the matrix units take fp32: exactly, for there is nothing else to compare with."""
    return "ieee" if dtype == torch.float32 else "tf32"


def checked(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a token's heads contiguous, or a BackendError that says what does not fit."""
    check_dtype(name, q)
    require(
        name,
        q.dim() == k.dim() == 3 and k.shape == v.shape and k.shape[-1] == q.shape[-1],
        f"takes q [T, Hq, D], k and v [Tk, Hkv, D], not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
    )
    require(
        name,
        q.dtype is k.dtype is v.dtype and q.device == k.device == v.device == cu_q.device == cu_k.device,
        f"q, k and v differ in dtype or any two inputs in device: {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, "
        f"{k.device}, {v.device}, {cu_q.device}, {cu_k.device}",
    )
    heads, kv_heads, d = q.shape[1], k.shape[1], q.shape[2]
    require(
        name,
        0 < d <= MAX_HEAD_DIM and d % 8 == 0,
        f"head_dim must be a multiple of 8 and at most {MAX_HEAD_DIM}, not {d}",
    )
    require(
        name,
        kv_heads > 0 and heads > 0 and heads % kv_heads == 0,
        f"{kv_heads} key heads do not divide {heads} query heads",
    )
    require(
        name,
        cu_q.dtype is cu_k.dtype is torch.int32
        and cu_q.shape == cu_k.shape
        and cu_q.dim() == 1
        and cu_q.shape[0] > 1
        and cu_q.is_contiguous()
        and cu_k.is_contiguous(),
        f"cu_q and cu_k must be contiguous [S + 1] int32 with S > 0, not {tuple(cu_q.shape)} of {cu_q.dtype} and "
        f"{tuple(cu_k.shape)} of {cu_k.dtype}",
    )
    require(name, 0 <= max_q <= q.shape[0], f"max_q is {max_q}, but q has {q.shape[0]} tokens")
    require(name, 0 <= max_k <= k.shape[0], f"max_k is {max_k}, but k has {k.shape[0]} tokens")
    require(name, scale > 0, f"scale must be above 0, not {scale}")
    require(name, window is None or window >= 0, f"window must be at least 0, not {window}")
    require(name, softcap is None or softcap >= 0, f"softcap must be at least 0, not {softcap}")
    q, k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k, v))
    return q, k, v
