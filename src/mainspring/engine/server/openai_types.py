"""The JSON of OpenAI's completions and chat completions: requests as pydantic models, answers as msgspec structs.

Types and unknown names are checked here; ranges are checked once, by `SamplingParams`. A field of OpenAI's
API that would change the text but is not supported is accepted only with its neutral value, so that no
field silently does nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_CHOICES = 128
MAX_LOGPROBS = 20

Tokens: TypeAlias = list[int]


def _neutral(*values: object) -> AfterValidator:
    """Accepts only the values that ask for nothing."""

    def check(value: object) -> object:
        if value not in values:
            raise ValueError("this parameter is not supported by this server; leave it out")
        return value

    return AfterValidator(check)


def _prompts(value: Any) -> Any:
    """Checks a completion's prompt: text, token ids, or a non-empty list of either."""
    if isinstance(value, str) or _is_ids(value):
        return value
    if isinstance(value, list) and (all(isinstance(item, str) for item in value) or all(map(_is_ids, value))):
        return value
    raise ValueError(
        "must be a string, a list of token ids, a list of strings, or a list of lists of token ids"
    )


def _is_ids(value: Any) -> bool:
    """Whether this is a list of token ids. An empty list is one: an empty prompt is refused later, by name."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _stops(value: Any) -> Any:
    """Checks the form of stop strings."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or a list of strings")


def _content(value: Any) -> Any:
    """Checks a message's content; the chat template decides how its parts are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content parts must be {{'type': 'text', 'text': string}}, not {kind!r}")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream carries besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[bool | None, _neutral(None, False)] = None
    include_obfuscation: Annotated[bool | None, _neutral(None, False)] = None


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[dict[str, Any]], BeforeValidator(_content)]
    name: str | None = None
    refusal: Annotated[str | None, _neutral(None)] = None
    tool_calls: Annotated[list[Any] | None, _neutral(None, [])] = None
    tool_call_id: str | None = None


class GenerationRequest(_Body):
    """What chat and plain completions share. None means: not given."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stops)] = None
    # Names of vLLM's, beyond OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    # Of OpenAI's, without an effect on the text.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Of OpenAI's, not supported.
    presence_penalty: Annotated[float | None, _neutral(None, 0.0)] = None
    frequency_penalty: Annotated[float | None, _neutral(None, 0.0)] = None
    logit_bias: Annotated[dict[str, float] | None, _neutral(None, {})] = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    modalities: Annotated[list[str] | None, _neutral(None, ["text"])] = None
    response_format: Annotated[dict[str, Any] | None, _neutral(None, {"type": "text"})] = None
    tools: Annotated[list[Any] | None, _neutral(None, [])] = None
    tool_choice: Annotated[str | None, _neutral(None, "none", "auto")] = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | Tokens | list[str] | list[Tokens], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int | None, _neutral(None, 1)] = None
    echo: Annotated[bool | None, _neutral(None, False)] = None
    suffix: Annotated[str | None, _neutral(None, "")] = None


class PromptTokensDetails(msgspec.Struct):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens read and written by one request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    """One candidate at one position of a chat completion. `bytes`: the token's UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The chosen token at one position of a chat completion, and the likeliest candidates."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat completion, one entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(msgspec.Struct):
    """The answer of a chat completion."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: ChatLogprobs | None = None


class ChatDelta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    logprobs: ChatLogprobs | None = None


class CompletionChoice(msgspec.Struct):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: CompletionLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    """The answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"


class ChatCompletionChunk(msgspec.Struct):
    """One event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


class Completion(msgspec.Struct):
    """The answer to POST /v1/completions, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class ModelCard(msgspec.Struct):
    """One entry of GET /v1/models. `max_model_len`: the context in tokens, prompt and answer together."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "mainspring"


class ModelList(msgspec.Struct):
    """The answer to GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"
