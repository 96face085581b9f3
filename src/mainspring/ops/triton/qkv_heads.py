"""From the fused QKV projection to attention: norms of the heads and RoPE; and back, into one gradient.

The forward bits are those of `rms_norm` of q and of k, then `rope` (see norm_rope_cache.py). The gradient takes one
launch in place of four: it rotates back, differentiates the norms, and writes q's, k's and v's part where they belong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.norm import column_sum_kernel, row_shape
from mainspring.ops.triton.norm_rope_cache import column_rotation, store_normed_rotated
from mainspring.ops.triton.rope import (
    check_rotation,
    load_pairs,
    rope,
    store_pairs,
    token_rotation,
    turned,
)
from mainspring.ops.triton.support import canonical_rows, multiprocessors, on_device, require

_PROGRAMS = 8  # of a multiprocessor, in the backward pass with norms
_COLUMNS = 32


@triton.jit(do_not_specialize=["rope_scale", "eps"])
def norm_rope_kernel(
    q, k, q_weight, k_weight, q_out, k_out, positions, rows, inv_freq, rope_scale, eps, q_stride, k_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_GROUPS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWED: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, groups of GROUP heads: first those of q, then those of k)."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    cos, sin = column_rotation(positions, rows, inv_freq, token, columns, rope_scale, HALF, ROWED)
    if group < Q_GROUPS:
        store_normed_rotated(
            q + token * q_stride, q_weight, q_out + token * (Q_HEADS * DIM), group, columns, cos, sin, eps,
            Q_HEADS, GROUP, DIM, HALF,
        )  # fmt: skip
    else:
        store_normed_rotated(
            k + token * k_stride, k_weight, k_out + token * (K_HEADS * DIM), group - Q_GROUPS, columns, cos, sin, eps,
            K_HEADS, GROUP, DIM, HALF,
        )  # fmt: skip


@triton.jit
def _head_gradients(
    grad, source, weight, target, sum_first, sum_second, cos, sin, pairs, eps,
    HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A token's heads: the gradient rotated back, through the norm, to target; (its part of the weight's) added."""
    half: tl.constexpr = DIM // 2
    dtype: tl.constexpr = target.dtype.element_ty
    g1, g2 = load_pairs(grad, pairs, HEADS, PADDED, DIM, half, False)
    d1, d2 = turned(g1, g2, cos, sin)
    if NORM:
        x1, x2 = load_pairs(source, pairs, HEADS, PADDED, DIM, half, False)
        w1 = tl.load(weight + pairs, pairs < half, 0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + half + pairs, pairs < half, 0.0).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / DIM + eps)[:, None]
        n1, n2 = x1 * scale, x2 * scale
        sum_first += d1 * n1
        sum_second += d2 * n2
        d1, d2 = d1 * w1, d2 * w2
        share = (tl.sum(d1 * n1 + d2 * n2, 1) / DIM)[:, None]
        d1, d2 = (d1 - n1 * share) * scale, (d2 - n2 * share) * scale
    store_pairs(target, d1.to(dtype), d2.to(dtype), pairs, HEADS, PADDED, DIM, half, False)
    return sum_first, sum_second


@triton.jit(do_not_specialize=["tokens", "rope_scale", "eps"])
def qkv_gradient_kernel(
    dq, dk, dv, qkv, q_weight, k_weight, out, partial, positions, rows, inv_freq, tokens, rope_scale, eps,
    dq_stride, dk_stride, dv_stride, qkv_stride,
    Q_HEADS: tl.constexpr, Q_PADDED: tl.constexpr, K_HEADS: tl.constexpr, K_PADDED: tl.constexpr, DIM: tl.constexpr,
    PAIRS: tl.constexpr, ROWED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. out: [tokens, Q_HEADS + 2 · K_HEADS, DIM]; partial: [programs, 2, DIM] fp32, the
    programs' sums for the gradients of both weights (with NORM)."""
    half: tl.constexpr = DIM // 2
    pairs = tl.arange(0, PAIRS)
    q1 = tl.zeros((Q_PADDED, PAIRS), tl.float32)
    q2 = tl.zeros((Q_PADDED, PAIRS), tl.float32)
    k1 = tl.zeros((K_PADDED, PAIRS), tl.float32)
    k2 = tl.zeros((K_PADDED, PAIRS), tl.float32)
    first_token = tl.program_id(0).to(tl.int64)
    for turn in tl.range(0, tl.cdiv(tokens - tl.program_id(0), tl.num_programs(0))):
        token = first_token + turn * tl.num_programs(0)
        cos, sin = token_rotation(positions, rows, inv_freq, token, pairs, rope_scale, half, ROWED, True)
        target = out + token * ((Q_HEADS + 2 * K_HEADS) * DIM)
        source = qkv + token * qkv_stride
        q1, q2 = _head_gradients(
            dq + token * dq_stride, source, q_weight, target, q1, q2, cos, sin, pairs, eps,
            Q_HEADS, Q_PADDED, DIM, NORM,
        )  # fmt: skip
        k1, k2 = _head_gradients(
            dk + token * dk_stride, source + Q_HEADS * DIM, k_weight, target + Q_HEADS * DIM, k1, k2, cos, sin, pairs,
            eps, K_HEADS, K_PADDED, DIM, NORM,
        )  # fmt: skip
        first, second = load_pairs(dv + token * dv_stride, pairs, K_HEADS, K_PADDED, DIM, half, False)
        dtype: tl.constexpr = out.dtype.element_ty
        store_pairs(
            target + (Q_HEADS + K_HEADS) * DIM, first.to(dtype), second.to(dtype), pairs, K_HEADS, K_PADDED, DIM, half,
            False,
        )  # fmt: skip
    if NORM:
        mine = partial + tl.program_id(0).to(tl.int64) * (2 * DIM) + pairs
        inside = pairs < half
        tl.store(mine, tl.sum(q1, 0), inside)
        tl.store(mine + half, tl.sum(q2, 0), inside)
        tl.store(mine + DIM, tl.sum(k1, 0), inside)
        tl.store(mine + DIM + half, tl.sum(k2, 0), inside)


def qkv_heads(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None = None,
    scale: float = 1.0,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated queries and keys, and values.

    Args:
        qkv: [T, Hq + 2 Hkv, D] float32, bfloat16 or float16, D a multiple of 16; a token's heads are contiguous.
        num_heads, num_kv_heads: Hq, Hkv.
        weights: [D] each in qkv's dtype, of the norms of q and k, or None.
        eps: added to the mean of squares.
        positions, inv_freq, rows, scale: as of `rope`; all of a head is rotated.
        in_place: without weights, q and k may be overwritten.

    Returns:
        q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], a view.

    Raises:
        BackendError: a dtype, shape or layout that the kernels do not take.
    """
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    _check(q, k, weights, positions, inv_freq, rows)
    if weights is None:
        q, k = rope(q, k, positions, inv_freq, rows, scale, in_place=in_place)
        return q, k, v
    tokens, _, d = qkv.shape
    group, block, warps = row_shape(d)
    q, k = canonical_rows(q), canonical_rows(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if tokens:
        q_groups = triton.cdiv(num_heads, group)
        with on_device(q):
            norm_rope_kernel[(tokens, q_groups + triton.cdiv(num_kv_heads, group))](
                q, k, *map(canonical_rows, weights), q_out, k_out, positions.contiguous(),
                positions if rows is None else rows.contiguous(), inv_freq.contiguous(), float(scale), eps,
                q.stride(0), k.stride(0), Q_HEADS=num_heads, K_HEADS=num_kv_heads, Q_GROUPS=q_groups, DIM=d,
                HALF=d // 2, GROUP=group, BLOCK=block, ROWED=rows is not None, num_warps=warps,
            )  # fmt: skip
    return q_out, k_out, v


def qkv_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of qkv [T, Hq + 2 Hkv, D], gradients of the norms' weights [D], or None without).

    dq: [T, Hq, D], dk, dv: [T, Hkv, D] of the results of `qkv_heads`; qkv and weights: its arguments, with norms.
    """
    _check(dq, dk, weights, positions, inv_freq, rows)
    tokens, num_heads, d = dq.shape
    num_kv_heads = dk.shape[1]
    dq, dk, dv = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (dq, dk, dv))
    out = torch.empty((tokens, num_heads + 2 * num_kv_heads, d), dtype=dq.dtype, device=dq.device)
    normed = weights is not None
    if qkv is not None and qkv.stride()[1:] != (d, 1):
        qkv = qkv.contiguous()
    source = out if qkv is None else qkv
    q_weight, k_weight = weights if weights is not None else (dq, dq)
    programs = min(tokens, _PROGRAMS * multiprocessors(dq.device)) if normed else tokens
    partial = torch.empty((programs if normed else 0, 2 * d), dtype=torch.float32, device=dq.device)
    sums = torch.empty(2 * d, dtype=dq.dtype, device=dq.device)
    if not tokens:
        sums.zero_()
    else:
        with on_device(dq):
            qkv_gradient_kernel[(programs,)](
                dq, dk, dv, source, q_weight, k_weight, out, partial, positions.contiguous(),
                positions if rows is None else rows.contiguous(), inv_freq.contiguous(), tokens, float(scale), eps,
                dq.stride(0), dk.stride(0), dv.stride(0), source.stride(0),
                Q_HEADS=num_heads, Q_PADDED=triton.next_power_of_2(num_heads), K_HEADS=num_kv_heads,
                K_PADDED=triton.next_power_of_2(num_kv_heads), DIM=d, PAIRS=triton.next_power_of_2(d // 2),
                ROWED=rows is not None, NORM=normed,
            )  # fmt: skip
            if normed:
                column_sum_kernel[(triton.cdiv(2 * d, _COLUMNS),)](
                    partial, sums, programs, H=2 * d, ROWS=_COLUMNS, COLUMNS=_COLUMNS, num_warps=4
                )
    return out, sums[:d] if normed else None, sums[d:] if normed else None


def _check(
    q: Tensor,
    k: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None,
) -> None:
    check_rotation("qkv_heads", q, k, positions, inv_freq, rows)
    d = q.shape[2]
    require("qkv_heads", d % 16 == 0, f"heads must be multiples of 16 elements, not {d}")
    half = inv_freq.shape[-1]
    require("qkv_heads", 2 * half == d, f"{half} frequencies do not rotate all of a head of {d}")
    for weight in weights or ():
        require(
            "qkv_heads",
            weight.shape == (d,) and weight.dtype is q.dtype,
            f"weights must be [{d}] of {q.dtype}, not {tuple(weight.shape)} of {weight.dtype}",
        )
