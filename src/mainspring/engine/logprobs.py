"""The log-probabilities that the engine reports: by the very operation that the trainer uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mainspring.engine.messages import TokenLogprobs
from mainspring.ops.log_probs import token_log_probs
from mainspring.ops.policy import Policy


def report_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int], policy: Policy
) -> list[TokenLogprobs]:
    """Log-probabilities of the given tokens and of the most likely ones, from the raw logits.

    logits: [N, V] float32; token_ids: the token whose log-probability is wanted, by row; num_top: how many
    of the most likely ones to add, by row.
    """
    targets = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    chosen: list[float] = token_log_probs(logits, targets, policy=policy).tolist()
    ranks: list[int] = ((logits > logits.gather(1, targets[:, None])).sum(dim=-1) + 1).tolist()
    width = min(max(num_top), logits.shape[1])
    if width == 0:
        return [
            TokenLogprobs([token], [logprob], rank)
            for token, logprob, rank in zip(token_ids, chosen, ranks, strict=True)
        ]
    top = logits.topk(width, dim=-1).indices  # [N, W]
    # Column by column through the same operation: the alternatives' bits are the trainer's too.
    columns = [token_log_probs(logits, top[:, i].contiguous(), policy=policy) for i in range(width)]
    top_logprobs: list[list[float]] = torch.stack(columns, dim=1).tolist()
    top_ids: list[list[int]] = top.tolist()
    return [
        TokenLogprobs([token, *top_ids[row][:count]], [logprob, *top_logprobs[row][:count]], rank)
        for row, (token, logprob, rank, count) in enumerate(
            zip(token_ids, chosen, ranks, num_top, strict=True)
        )
    ]
