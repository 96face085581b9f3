"""Sample texts from the model being trained. For serving there is the engine; this one needs no cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    next_logits: Callable[[Sequence[Sequence[int]]], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    stop_token_ids: Sequence[int],
    context_length: int,
    seed: int,
) -> list[list[int]]:
    """Continues each prompt (at least one token each); returns the new tokens, without a stop token.

    next_logits: of whole token sequences the logits that follow each, [N, vocab] (`Runner.next_logits`). All prompts
    go through the model together, whole, for each new token, cut to their last `context_length` tokens.
    temperature 0 takes the likeliest; top_k 0 samples among all.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [list(prompt) for prompt in prompts]
    running = list(range(len(texts)))
    for _ in range(max_tokens):
        if not running:
            break
        windows = [texts[i][-context_length:] for i in running]
        logits = next_logits(windows).float().cpu()
        for i, token in zip(list(running), _choose(logits, temperature, top_k, generator), strict=True):
            if token in stop_token_ids:
                running.remove(i)
            else:
                texts[i].append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> list[int]:
    """logits: [N, vocab] -> one token each."""
    if temperature == 0:
        choice: list[int] = logits.argmax(-1).tolist()
        return choice
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    drawn: list[int] = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
    return drawn
