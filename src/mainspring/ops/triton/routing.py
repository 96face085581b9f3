"""Top-k routing of tokens to experts, and the sum of their outputs: every order fixed, no atomics, no host sync.

Sorting is a counting sort whose blocks are fixed numbers of tokens: a block counts its rows for each expert, a scan
over the blocks says where each block's rows of an expert begin, and a row's rank in its block does the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import canonical_rows, check_dtype, on_device, require

MAX_EXPERTS = 1024
MAX_TOP_K = 32
_TILE = 2048  # elements (tokens x experts) of a block
_COLUMNS = 1024  # of a row that `combine` sums at a time


@triton.jit
def select_kernel(
    logits, weights, experts, counts, tokens, num_experts, stride,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The k largest logits of each token, the first of equal ones; counts: [blocks, experts] tokens of a block."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, EXPERTS)[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    inside = (row[:, None] < tokens) & (column < num_experts)
    value = tl.load(logits + row.to(tl.int64)[:, None] * stride + column, inside, float("-inf")).to(
        tl.float32
    )
    key = tl.where(value != value, float("inf"), value)  # a NaN is chosen, and makes its weights NaN
    top = tl.max(key, 1)
    taken = tl.broadcast_to(column >= num_experts, (ROWS, EXPERTS))
    chosen = tl.zeros((ROWS, SLOTS), tl.float32)
    chosen_expert = tl.zeros((ROWS, SLOTS), tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.max(tl.where(taken, float("-inf"), key), 1)
        expert = tl.min(tl.where(taken | (key != best[:, None]), EXPERTS, column), 1)
        hit = column == expert[:, None]
        taken = taken | hit
        chosen = tl.where(slot == j, tl.sum(tl.where(hit, value, 0.0), 1)[:, None], chosen)
        chosen_expert = tl.where(slot == j, expert[:, None], chosen_expert)
    share = tl.where(slot < TOP_K, tl.exp(chosen - top[:, None]), 0.0)
    total = tl.sum(share, 1) if NORMALISE else tl.sum(tl.exp(value - top[:, None]), 1)
    share = share / total[:, None]
    place = row.to(tl.int64)[:, None] * TOP_K + slot
    stored = (row[:, None] < tokens) & (slot < TOP_K)
    tl.store(weights + place, share.to(weights.dtype.element_ty), stored)
    tl.store(experts + place, chosen_expert, stored)
    count = tl.sum((taken & inside).to(tl.int32), 0)
    column = tl.arange(0, EXPERTS)
    tl.store(counts + block.to(tl.int64) * num_experts + column, count, column < num_experts)


@triton.jit
def scan_kernel(counts, totals, blocks, num_experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """counts: [blocks, experts], in place: what the blocks before a block have counted; totals: [experts]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < blocks) & (column[None, :] < num_experts)
        place = counts + row.to(tl.int64)[:, None] * num_experts + column[None, :]
        count = tl.load(place, inside, 0)
        tl.store(place, before[None, :] + tl.cumsum(count, 0) - count, inside)
        before += tl.sum(count, 0)
    tl.store(totals + column, before, column < num_experts)


@triton.jit
def place_kernel(
    experts, counts, totals, offsets, order, places, tokens, num_experts,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """places: [tokens, k], the row of each slot where rows are sorted by expert; order: the slot of each row."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, EXPERTS)
    known = column < num_experts
    total = tl.load(totals + column, known, 0)
    start = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + column, start, known)
        tl.store(offsets + num_experts, tl.sum(total, 0))
    start += tl.load(counts + block.to(tl.int64) * num_experts + column, known, 0)
    taken = tl.zeros((ROWS, EXPERTS), tl.int32)
    for j in tl.static_range(TOP_K):
        expert = tl.load(experts + row.to(tl.int64) * TOP_K + j, row < tokens, EXPERTS)
        taken += (column[None, :] == expert[:, None]).to(tl.int32)
    target = start[None, :] + tl.cumsum(taken, 0) - taken  # a token has an expert once at most
    for j in tl.static_range(TOP_K):
        slot = row.to(tl.int64) * TOP_K + j
        expert = tl.load(experts + slot, row < tokens, EXPERTS)
        place = tl.sum(tl.where(column[None, :] == expert[:, None], target, 0), 1)
        tl.store(places + slot, place, row < tokens)
        tl.store(order + place, slot.to(tl.int32), row < tokens)


@triton.jit
def select_backward_kernel(
    logits, experts, grad, grad_logits, tokens, num_experts, stride,
    TOP_K: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Of w = softmax(logits)[experts]: dl = p (g - sum(w g)), g at the chosen experts and 0 elsewhere; where the
    weights are normalised the softmax is that of the chosen logits alone, and so is dl."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, EXPERTS)[None, :]
    inside = (row[:, None] < tokens) & (column < num_experts)
    value = tl.load(logits + row.to(tl.int64)[:, None] * stride + column, inside, float("-inf")).to(
        tl.float32
    )
    chosen = tl.zeros((ROWS, EXPERTS), tl.int1)
    upstream = tl.zeros((ROWS, EXPERTS), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = row.to(tl.int64) * TOP_K + j
        hit = column == tl.load(experts + slot, row < tokens, EXPERTS)[:, None]
        chosen = chosen | hit
        upstream = tl.where(hit, tl.load(grad + slot, row < tokens, 0.0).to(tl.float32)[:, None], upstream)
    if NORMALISE:
        value = tl.where(chosen, value, float("-inf"))
    share = tl.exp(value - tl.max(value, 1)[:, None])
    share = share / tl.sum(share, 1)[:, None]
    share = tl.where(inside, share, 0.0)
    slope = share * (upstream - tl.sum(share * upstream, 1)[:, None])
    target = grad_logits + row.to(tl.int64)[:, None] * num_experts + column
    tl.store(target, slope.to(grad_logits.dtype.element_ty), inside)


@triton.jit
def combine_kernel(
    rows, weights, places, out, size, stride, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = sum over j of weights[t, j] · rows[places[t, j]], from the first slot to the last, in fp32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + j).to(tl.int64)
        value = tl.load(rows + place * stride + column, inside, 0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + j).to(tl.float32)
        total += value
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), inside)


@triton.jit
def combine_backward_kernel(
    rows, weights, order, grad, grad_rows, grad_weights, size, stride, grad_stride,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one sorted row: d row = w · g of its token, d w = <row, g>."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row).to(tl.int64)
    weight = tl.load(weights + slot).to(tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < size
        upstream = tl.load(grad + slot // TOP_K * grad_stride + column, inside, 0.0).to(tl.float32)
        product += upstream * tl.load(rows + row * stride + column, inside, 0.0).to(tl.float32)
        tl.store(grad_rows + row * size + column, (upstream * weight).to(grad_rows.dtype.element_ty), inside)
    tl.store(grad_weights + slot, tl.sum(product, 0).to(grad_weights.dtype.element_ty))


def _blocks(num_experts: int) -> tuple[int, int]:
    """(tokens, experts) of a block; a constant of the number of experts, for the sort's order rests on it."""
    experts = max(16, triton.next_power_of_2(num_experts))
    return max(1, min(64, _TILE // experts)), experts


def route(
    logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k experts of each token, and the rows that result sorted by expert.

    Args:
        logits: [T, E] float32, bfloat16 or float16; E at most 1024.
        top_k: experts of a token, at most 32.
        normalise: weights are the softmax over the chosen logits, or over all.
        weights_dtype: of the weights.

    Returns:
        weights [T, k]; experts [T, k] int32, the heaviest first, the first of equal logits; order [T · k] int32, the
        slot t · k + j of each row sorted by expert (slots of an expert rising); places [T, k] int32, its inverse;
        offsets [E + 1] int32, the first row of each expert.

    Raises:
        BackendError: a dtype or size that the kernels do not take.
    """
    check_dtype("route", logits)
    require("route", logits.dim() == 2, f"logits must be [T, E], not {tuple(logits.shape)}")
    tokens, num_experts = logits.shape
    require("route", 1 <= num_experts <= MAX_EXPERTS, f"takes 1 to {MAX_EXPERTS} experts, not {num_experts}")
    limit = min(num_experts, MAX_TOP_K)
    require(
        "route", 1 <= top_k <= limit, f"top_k must be 1 to {limit} for {num_experts} experts, not {top_k}"
    )
    device, block = logits.device, _blocks(num_experts)
    logits = canonical_rows(logits)
    weights = torch.empty((tokens, top_k), dtype=weights_dtype, device=device)
    experts, places = (torch.empty((tokens, top_k), dtype=torch.int32, device=device) for _ in range(2))
    order = torch.empty(tokens * top_k, dtype=torch.int32, device=device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    if tokens == 0:
        return weights, experts, order, places, offsets
    blocks = triton.cdiv(tokens, block[0])
    counts = torch.empty((blocks, num_experts), dtype=torch.int32, device=device)
    totals = torch.empty(num_experts, dtype=torch.int32, device=device)
    with on_device(logits):
        select_kernel[(blocks,)](
            logits, weights, experts, counts, tokens, num_experts, logits.stride(0), TOP_K=top_k,
            SLOTS=triton.next_power_of_2(top_k), NORMALISE=normalise, ROWS=block[0], EXPERTS=block[1],
        )  # fmt: skip
        scan_kernel[(triton.cdiv(num_experts, 16),)](
            counts, totals, blocks, num_experts, ROWS=128, COLUMNS=16
        )
        place_kernel[(blocks,)](
            experts, counts, totals, offsets, order, places, tokens, num_experts,
            TOP_K=top_k, ROWS=block[0], EXPERTS=block[1],
        )  # fmt: skip
    return weights, experts, order, places, offsets


def route_backward(logits: Tensor, experts: Tensor, grad: Tensor, normalise: bool) -> Tensor:
    """The gradient of `route`'s weights. logits: [T, E]; experts, grad: [T, k] -> [T, E] in logits' dtype."""
    tokens, num_experts = logits.shape
    logits, grad = canonical_rows(logits), grad.contiguous()
    out = torch.empty((tokens, num_experts), dtype=logits.dtype, device=logits.device)
    rows, width = _blocks(num_experts)
    if tokens:
        with on_device(logits):
            select_backward_kernel[(triton.cdiv(tokens, rows),)](
                logits, experts, grad, out, tokens, num_experts, logits.stride(0),
                TOP_K=experts.shape[1], NORMALISE=normalise, ROWS=rows, EXPERTS=width,
            )  # fmt: skip
    return out


def combine(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    """Each token's rows, weighted (None: by 1) and added in the order of its slots in fp32, rounded once.

    rows: [R, H]; weights: [T, k]; places: [T, k] int32 -> [T, H] in rows' dtype.

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    check_dtype("combine", rows)
    fits = rows.dim() == 2 and places.dim() == 2 and (weights is None or weights.shape == places.shape)
    require("combine", fits, "rows must be [R, H], places [T, k], weights as places or None")
    require("combine", places.dtype == torch.int32, f"places must be int32, not {places.dtype}")
    (tokens, top_k), size = places.shape, rows.shape[1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((tokens, size), dtype=rows.dtype, device=rows.device)
    if tokens and size:
        block = min(_COLUMNS, triton.next_power_of_2(size))
        with on_device(rows):
            combine_kernel[(tokens, triton.cdiv(size, block))](
                rows, None if weights is None else weights.contiguous(), places.contiguous(), out, size,
                rows.stride(0), TOP_K=top_k, WEIGHTED=weights is not None, BLOCK=block,
            )  # fmt: skip
    return out


def combine_backward(rows: Tensor, weights: Tensor, order: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `combine`'s rows [R, H] and weights [T, k]; order: [R], the slot of each row; grad: [T, H]."""
    size = rows.shape[1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    if order.numel():
        with on_device(rows):
            combine_backward_kernel[(order.numel(),)](
                rows, weights.contiguous(), order, grad, grad_rows, grad_weights, size, rows.stride(0),
                grad.stride(0), TOP_K=weights.shape[1], BLOCK=min(_COLUMNS, triton.next_power_of_2(size)),
            )  # fmt: skip
    return grad_rows, grad_weights
