"""The JSON of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from mainspring.engine.server.openai_types import (
    MAX_LOGPROBS,
    Body,
    ChatLogprobs,
    GenerationRequest,
    PromptLogprobs,
    Usage,
    documented,
    neutral,
)

FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


def _content(value: Any) -> Any:
    """Checks a message's content; the chat template decides how its parts are joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content parts must be {{'type': 'text', 'text': string}}, not {kind!r}")
    return value


class FunctionCall(Body):
    """A call that an earlier answer made."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A tool call in a message of the conversation. `index` is what streamed calls carry; it means nothing here."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Body):
    """One message of a conversation. Only an assistant's message may be without content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[dict[str, Any]] | None, BeforeValidator(_content), Field(validate_default=True)
    ] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    # An answer that is sent back as it came has these.
    refusal: Annotated[str | None, neutral(None)] = None
    annotations: Annotated[list[Any] | None, neutral(None, [])] = None
    audio: Annotated[dict[str, Any] | None, neutral(None)] = None
    function_call: Annotated[dict[str, Any] | None, neutral(None)] = None

    @field_validator("content", mode="after")
    @classmethod
    def _has_content(cls, content: Any, info: ValidationInfo) -> Any:
        role = info.data.get("role", "assistant")
        if content is None and role != "assistant":
            raise ValueError(f"a message of the role {role} must have content")
        return content

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only an assistant's message may have tool_calls and reasoning_content")
        return self


class FunctionDefinition(Body):
    """A function that the model may call. `parameters`: the JSON schema of its arguments.

    Under tool_choice "required" or by name a grammar holds the model to the schema, `strict` or not; under "auto" it
    does if `strict`.
    """

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """The function of a named tool choice."""

    name: str


class NamedToolChoice(Body):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


class SchemaFormat(Body):
    """A JSON schema that the answer must follow; it is always followed strictly."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer: free text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to the type "json_schema", and to no other')
        return self


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, documented(minimum=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    modalities: Annotated[list[str] | None, neutral(None, ["text"])] = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # vLLM's.
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class CalledFunction(msgspec.Struct):
    """The function of a call, or what a chunk adds to it."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class AnsweredToolCall(msgspec.Struct):
    """A call in an answer."""

    id: str
    function: CalledFunction
    type: str = "function"


class ToolCallDelta(msgspec.Struct):
    """What a chunk adds to the `index`-th call; the first chunk of a call has id and type."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class AssistantMessage(msgspec.Struct):
    """The answer of a chat completion. `content` is None if there is nothing but calls or reasoning."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    """The answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct):
    """One event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"
    prompt_token_ids: list[int] | UnsetType = UNSET
