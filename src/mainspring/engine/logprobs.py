"""The log-probabilities that the engine reports: by the very operation that the trainer uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.engine.messages import TokenLogprobs
from mainspring.ops.log_probs import token_log_probs
from mainspring.ops.policy import Policy


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Of N rows of logits: a token's log-probability and rank, and the W likeliest tokens.

    tokens, ranks: [N] int64; logprobs: [N] float32; top_tokens: [N, W] int64; top_logprobs: [N, W] float32.
    """

    tokens: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor

    def to_host(self) -> LogprobTensors:
        """On the CPU. From a GPU the copies are only under way: wait for the stream before reading them."""
        return LogprobTensors(
            *(getattr(self, name).to("cpu", non_blocking=True) for name in self.__dataclass_fields__)
        )

    def entries(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """One entry a row (tensors on the CPU), with the num_top[n] likeliest tokens of row n."""
        tokens, logprobs, ranks = self.tokens.tolist(), self.logprobs.tolist(), self.ranks.tolist()
        if not self.top_tokens.shape[1]:
            return [
                TokenLogprobs([token], [logprob], rank)
                for token, logprob, rank in zip(tokens, logprobs, ranks, strict=True)
            ]
        top_tokens, top_logprobs = self.top_tokens.tolist(), self.top_logprobs.tolist()
        return [
            TokenLogprobs([token, *top_tokens[row][:count]], [logprob, *top_logprobs[row][:count]], rank)
            for row, (token, logprob, rank, count) in enumerate(
                zip(tokens, logprobs, ranks, num_top, strict=True)
            )
        ]


def compute_logprobs(
    logits: Tensor, tokens: Tensor, num_top: int, policy: Policy, temperature: float = 1.0
) -> LogprobTensors:
    """Log-probabilities of the given tokens and of the num_top likeliest, from the raw logits / temperature.

    logits: [N, V] float32; tokens: [N] int64. Does not wait for the device.
    """
    chosen = token_log_probs(logits, tokens, temperature, policy=policy)
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(dim=-1) + 1
    width = min(num_top, logits.shape[1])
    top = logits.topk(width, dim=-1).indices if width else tokens.new_empty((tokens.shape[0], 0))
    # Column by column through the same operation: the alternatives' bits are the trainer's too.
    columns = [
        token_log_probs(logits, top[:, i].contiguous(), temperature, policy=policy) for i in range(width)
    ]
    top_logprobs = torch.stack(columns, dim=1) if columns else chosen.new_empty((tokens.shape[0], 0))
    return LogprobTensors(tokens, chosen, ranks, top, top_logprobs)
