"""The JSON of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field

from mainspring.engine.server.openai_types import (
    MAX_LOGPROBS,
    CompletionLogprobs,
    GenerationRequest,
    PromptLogprobs,
    Tokens,
    Usage,
    documented,
    is_ids,
    neutral,
)


def prompts(value: Any) -> Any:
    """Checks a completion's prompt: text, token ids, or a non-empty list of either."""
    if isinstance(value, str) or is_ids(value):
        return value
    if isinstance(value, list) and (all(isinstance(item, str) for item in value) or all(map(is_ids, value))):
        return value
    raise ValueError(
        "must be a string, a list of token ids, a list of strings, or a list of lists of token ids"
    )


def split_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    several = [item for item in prompt if not isinstance(item, int)]
    return list(several) if several else [[item for item in prompt if isinstance(item, int)]]


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions.

    `max_tokens` may be 0 with `echo`: the prompt's log-probabilities and nothing more.
    """

    prompt: Annotated[
        str | Tokens | list[str] | list[Tokens], BeforeValidator(prompts), documented(minLength=1, minItems=1)
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int | None, neutral(None, 1)] = None


class CompletionChoice(msgspec.Struct):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The answer to POST /v1/completions, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
