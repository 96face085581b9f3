"""Attention over packed sequences in plain PyTorch: the formula that the flash-attention kernels are tested against.

Autograd differentiates it. It keeps every score of a sequence, so it is for tests and small inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(s) v for every sequence, with s = scale · q kᵀ, or softcap · tanh(scale · q kᵀ / softcap).

    Query i of the n queries of a sequence of m keys stands at position p = m - n + i. It sees key j if j <= p
    (causal) and j > p - window (with a window). Query head h reads key head h // (Hq / Hkv).

    Args:
        q: [T, Hq, D] in any floating dtype; everything is computed in it.
        k: [Tk, Hkv, D]; Hkv divides Hq.
        v: likewise.
        cu_q: [S + 1] integers from 0 to T: where sequences of queries begin and end.
        cu_k: [S + 1] integers from 0 to Tk, of keys.
        scale: factor of the scores.
        causal: whether a query sees no key after its position.
        window: sliding window in keys, or None or 0 for all.
        softcap: bound of the scores, or None or 0 for none.

    Returns:
        out: [T, Hq, D]; zeros where a query sees no key.
        lse: [Hq, T], the natural logarithm of the sum of exp(s) over the keys seen; -inf where there is none.
    """
    heads = q.shape[1]
    group = heads // k.shape[1]
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    outs = [q.new_zeros(0, heads, q.shape[2])]
    lses = [q.new_zeros(heads, 0)]
    for s in range(len(q_ends) - 1):
        queries = q[q_ends[s] : q_ends[s + 1]].transpose(0, 1)
        keys = k[k_ends[s] : k_ends[s + 1]].transpose(0, 1).repeat_interleave(group, 0)
        values = v[k_ends[s] : k_ends[s + 1]].transpose(0, 1).repeat_interleave(group, 0)
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        unseen = ~visible(queries.shape[1], keys.shape[1], causal, window, q.device)
        out, lse = _softmax_product(scores.masked_fill(unseen, -torch.inf), values)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by hand, from what `forward` returned (FlashAttention-2, arXiv 2307.08691, 3.1.2).

    With P = exp(s - lse): dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - rowsum(dO ∘ O)), through the cap's derivative
    1 - (s / softcap)², dQ = scale · dS K, dK = scale · dSᵀ Q, summed over the query heads that share a key head.
    """
    group = q.shape[1] // k.shape[1]
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    for s in range(len(q_ends) - 1):
        rows, columns = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
        queries, d_out, result = (t[rows].transpose(0, 1) for t in (q, grad, out))
        keys, values = (t[columns].transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        slope = torch.ones((), dtype=q.dtype, device=q.device)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
            slope = 1 - (scores / softcap).square()
        seen = visible(queries.shape[1], keys.shape[1], causal, window, q.device)
        weights = torch.exp(scores - lse[:, rows, None]).masked_fill(~seen, 0.0)
        delta = (d_out * result).sum(-1, keepdim=True)
        d_scores = weights * (d_out @ values.transpose(1, 2) - delta) * slope * scale
        d_q[rows] = (d_scores @ keys).transpose(0, 1)
        for target, shared in (
            (d_k, d_scores.transpose(1, 2) @ queries),
            (d_v, weights.transpose(1, 2) @ d_out),
        ):
            target[columns] = shared.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return d_q, d_k, d_v


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees: [queries, keys] bool."""
    rows = torch.arange(keys - queries, keys, device=device)[:, None]
    columns = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (columns <= rows)
    if window:
        seen = seen & (columns > rows - window)
    return seen


def _softmax_product(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [H, n, m] and values [H, m, D] -> (out [H, n, D], lse [H, n]); rows of only -inf give 0 and -inf,
    and no NaN in any gradient."""
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        return scores @ values, lse
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (torch.log(total) + peak).masked_fill(empty, -torch.inf)
    return (weights @ values) / total, lse.squeeze(-1)
