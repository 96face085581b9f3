"""From the engine's outputs to the pieces that OpenAI's answers share: usage and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from mainspring.engine.outputs import Logprob, PositionLogprobs, RequestOutput
from mainspring.engine.server.openai_types import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mainspring.formats.tokenizer import Tokenizer

# JSON has no minus infinity; vLLM's stand-in.
LOWEST_LOGPROB = -9999.0


class UsageCounter:
    """Counts tokens over the choices of one HTTP request. A prompt counts once, however many choices it has."""

    def __init__(self, prompt_lengths: Sequence[int]) -> None:
        self._prompt_tokens = sum(prompt_lengths)
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, prompt: int, choice: int, output: RequestOutput, *, answered: bool = True) -> None:
        """Takes an output (its tokens are new) of that choice of the prompt of that number.

        `answered`: its tokens are part of the answer.
        """
        if choice == 0:
            # The other choices share the first one's prompt: for them all of it was there.
            self._cached[prompt] = output.num_cached_tokens
        if answered:
            self._completion_tokens += len(output.outputs[0].token_ids)

    def usage(self) -> Usage:
        """The count so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached.values())),
        )


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int, tokenizer: Tokenizer
) -> ChatLogprobs:
    """Log-probabilities in the form of chat completions; `top` likeliest tokens at each position."""
    content: list[TokenLogprob] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        chosen = _top_logprob(token_id, position[token_id], tokenizer)
        likeliest = sorted(position.items(), key=lambda item: item[1].rank)[:top]
        content.append(
            TokenLogprob(
                token=chosen.token,
                logprob=chosen.logprob,
                bytes=chosen.bytes,
                top_logprobs=[_top_logprob(*item, tokenizer) for item in likeliest if item[1].rank <= top],
            )
        )
    return ChatLogprobs(content)


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    offset: int,
    tokenizer: Tokenizer,
    *,
    num_hidden: int = 0,
) -> CompletionLogprobs:
    """Log-probabilities in the form of completions; the first token's text stands `offset` characters in.

    A position without any (the first of a prompt) has nulls. The first `num_hidden` tokens are not in the text.
    """
    answer = CompletionLogprobs([], [], [], [])
    for index, (token_id, position) in enumerate(zip(token_ids, positions, strict=True)):
        if position is None:
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            answer.token_logprobs.append(None)
            answer.top_logprobs.append(None)
        else:
            text = position[token_id].decoded_token or ""
            answer.token_logprobs.append(max(position[token_id].logprob, LOWEST_LOGPROB))
            top: dict[str, float] = {}
            for candidate in sorted(position.values(), key=lambda candidate: candidate.rank):
                # Two ids may read the same; the likelier one keeps the name.
                top.setdefault(candidate.decoded_token or "", max(candidate.logprob, LOWEST_LOGPROB))
            answer.top_logprobs.append(top)
        answer.tokens.append(text)
        answer.text_offset.append(offset)
        offset += 0 if index < num_hidden else len(text)
    return answer


def prompt_logprobs(output: RequestOutput) -> PromptLogprobs | UnsetType:
    """Log-probabilities of the prompt in vLLM's form, where they were asked for."""
    if output.prompt_logprobs is None:
        return UNSET
    return [
        None
        if position is None
        else {
            token_id: PromptLogprob(max(p.logprob, LOWEST_LOGPROB), p.rank, p.decoded_token or "")
            for token_id, p in position.items()
        }
        for position in output.prompt_logprobs
    ]


def _top_logprob(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> TopLogprob:
    return TopLogprob(
        token=logprob.decoded_token or "",
        logprob=max(logprob.logprob, LOWEST_LOGPROB),
        bytes=list(tokenizer.token_bytes(token_id)),
    )
