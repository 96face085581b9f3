"""What the JSON of several of OpenAI's routes shares: requests as pydantic models, answers as msgspec structs.

Types and unknown names are checked here; ranges are checked once, by `SamplingParams`. A field of OpenAI's
API that would change the text but is not supported is accepted only with its neutral value, so that no
field silently does nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema, core_schema

from mainspring.engine.sampling_params import MAX_N, MAX_TEMPERATURE, REPETITION_PENALTIES

MAX_CHOICES = MAX_N
MAX_LOGPROBS = 20

Tokens: TypeAlias = list[Annotated[int, Field(json_schema_extra={"minimum": 0})]]


class _Neutral:
    """The check behind `neutral`, and what the OpenAPI document says of it."""

    def __init__(self, values: tuple[object, ...]) -> None:
        self._values = values

    def _check(self, value: object) -> object:
        if value not in self._values:
            raise ValueError("this parameter is not supported by this server; leave it out")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._values)}


def neutral(*values: object) -> _Neutral:
    """Accepts only the values that ask for nothing."""
    return _Neutral(values)


def documented(**schema: Any) -> Any:
    """Tells the OpenAPI document of a range that is checked elsewhere."""
    return Field(json_schema_extra=schema)


def is_ids(value: Any) -> bool:
    """Whether this is a list of token ids. An empty list is one: an empty prompt is refused later, by name."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _stops(value: Any) -> Any:
    """Checks the form of stop strings."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or a list of strings")


def _biases(value: Any) -> Any:
    """Token ids are the names of an object's members in JSON, and so strings."""
    if not isinstance(value, dict):
        return value
    keys = [key for key in value if not (isinstance(key, str) and key.isdecimal() and len(key) < 20)]
    if keys:
        raise ValueError(f"its names must be token ids, not {str(keys[0])[:40]!r}")
    return {int(key): bias for key, bias in value.items()}


class Body(BaseModel):
    """A request: no unknown name, and no value that is of another type than it should be."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_ID_NAMES = {"pattern": "^[0-9]{1,9}$"}


class StructuredOutputs(Body):
    """What the text must be; exactly one is given. As in vLLM."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Body):
    """What a stream carries besides its text."""

    include_usage: bool | None = None
    # vLLM's: every chunk counts the tokens so far.
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[bool | None, neutral(None, False)] = None


class GenerationRequest(Body):
    """What chat and plain completions share. None means: not given."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, documented(minimum=1)] = None
    temperature: Annotated[float | None, documented(minimum=0, maximum=MAX_TEMPERATURE)] = None
    top_p: Annotated[float | None, documented(exclusiveMinimum=0, maximum=1)] = None
    seed: Annotated[int | None, documented(minimum=-(2**63), maximum=2**63 - 1)] = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stops), documented(minLength=1)] = None
    presence_penalty: Annotated[float | None, documented(minimum=-2, maximum=2)] = None
    frequency_penalty: Annotated[float | None, documented(minimum=-2, maximum=2)] = None
    logit_bias: Annotated[
        dict[int, float] | None,
        BeforeValidator(_biases),
        documented(propertyNames={"pattern": "^[0-9]{1,9}$"}),
    ] = None
    # Names of vLLM's, beyond OpenAI's.
    top_k: Annotated[int | None, documented(minimum=-1)] = None
    min_p: Annotated[float | None, documented(minimum=0, maximum=1)] = None
    repetition_penalty: Annotated[
        float | None, documented(minimum=REPETITION_PENALTIES[0], maximum=REPETITION_PENALTIES[1])
    ] = None
    allowed_token_ids: Annotated[Tokens | None, documented(minItems=1)] = None
    bad_words: list[Annotated[str, documented(minLength=1)]] | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Annotated[int | None, documented(minimum=-(2**31), maximum=2**31 - 1)] = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    min_tokens: Annotated[int | None, documented(minimum=0)] = None
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

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream counts the tokens so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


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


class PromptLogprob(msgspec.Struct):
    """One candidate at one position of a prompt, as vLLM gives it. `rank`: 1 for the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


# By token id, the prompt's own token among them; the first position has none.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat completion, one entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion: parallel lists, one entry a token. The first of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ModelCard(msgspec.Struct):
    """One entry of GET /v1/models.

    `max_model_len`: the context in tokens, prompt and answer together. `parent`: the model that an adapter belongs to.
    """

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "mainspring"
    parent: str | UnsetType = UNSET


class ModelList(msgspec.Struct):
    """The answer to GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"
