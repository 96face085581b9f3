"""The JSON of POST /v1/responses: the subset of texts and functions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag

from mainspring.engine.sampling_params import MAX_TEMPERATURE
from mainspring.engine.server.chat_types import FUNCTION_NAME
from mainspring.engine.server.openai_types import MAX_LOGPROBS, Body, TokenLogprob, documented, neutral

LOGPROBS = "message.output_text.logprobs"
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class TextPart(Body):
    """A piece of text: of an input, or of an earlier answer, which comes back with empty annotations."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: Annotated[list[Any] | None, neutral(None, [])] = None
    # Of an earlier answer; they say nothing about this one.
    logprobs: list[Any] | None = None


def _form(value: Any) -> str | None:
    """The tag of an input: a text, or items."""
    return "Text" if isinstance(value, str) else "Items" if isinstance(value, list) else None


class InputMessage(Body):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("Text")] | Annotated[list[TextPart], Tag("Items")], Discriminator(_form)
    ]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class InputCall(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class InputCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[
        Annotated[str, Tag("Text")] | Annotated[list[TextPart], Tag("Items")], Discriminator(_form)
    ]
    id: str | None = None
    status: Status | None = None


class InputReasoning(Body):
    """What the model thought before an earlier answer."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[TextPart] | None = None
    content: list[TextPart] | None = None
    encrypted_content: Annotated[str | None, neutral(None)] = None
    status: Status | None = None


def _kind(value: Any) -> str | None:
    """The tag of an item; a message need not say that it is one."""
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    tags = {
        "message": "Message",
        "function_call": "Call",
        "function_call_output": "Output",
        "reasoning": "Reasoning",
    }
    return tags.get(kind) if isinstance(kind, str) else None


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[InputCall, Tag("Call")]
    | Annotated[InputCallOutput, Tag("Output")]
    | Annotated[InputReasoning, Tag("Reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """The model must call this function."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the answer: free text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Body):
    """The form of the answer's text."""

    format: TextFormat | None = None
    verbosity: Annotated[str | None, neutral(None, "medium")] = None


class ReasoningSettings(Body):
    """How much the model is to think, for templates that know of it."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Annotated[str | None, neutral(None, "auto")] = None


class ResponsesStreamOptions(Body):
    """What a stream carries besides its text."""

    include_obfuscation: Annotated[bool | None, neutral(None, False)] = None


class ResponsesRequest(Body):
    """The body of POST /v1/responses. Nothing is kept: each request brings its whole conversation."""

    model: str | None = None
    input: Annotated[
        Annotated[str, Tag("Text")] | Annotated[list[InputItem], Field(min_length=1), Tag("Items")],
        Discriminator(_form),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, documented(minimum=1)] = None
    temperature: Annotated[float | None, documented(minimum=0, maximum=MAX_TEMPERATURE)] = None
    top_p: Annotated[float | None, documented(exclusiveMinimum=0, maximum=1)] = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    # Without an effect on the text.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Not supported.
    background: Annotated[bool | None, neutral(None, False)] = None
    previous_response_id: Annotated[str | None, neutral(None)] = None
    conversation: Annotated[Any, neutral(None)] = None
    prompt: Annotated[Any, neutral(None)] = None
    max_tool_calls: Annotated[int | None, neutral(None)] = None
    truncation: Annotated[str | None, neutral(None, "disabled")] = None


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    """The text of an answer."""

    text: str
    annotations: list[None] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text"):
    """What the model thought."""

    text: str


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    """A message of the answer."""

    id: str
    content: list[OutputText]
    status: Status = "in_progress"
    role: str = "assistant"


class OutputReasoning(msgspec.Struct, tag_field="type", tag="reasoning"):
    """Thoughts before the answer."""

    id: str
    content: list[ReasoningText]
    status: Status = "in_progress"
    summary: list[None] = []


class OutputCall(msgspec.Struct, tag_field="type", tag="function_call"):
    """A call that the answer makes."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem: TypeAlias = OutputMessage | OutputReasoning | OutputCall


class InputDetails(msgspec.Struct):
    """Of the input's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """Of the output's tokens: how many came before the reasoning's end."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(msgspec.Struct):
    """Why an answer is not complete."""

    reason: str


class ResponseError(msgspec.Struct):
    """Why an answer failed."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer, and the settings that it was made with."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputItem]
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[Any]
    temperature: float
    top_p: float
    text: Any
    reasoning: Any
    max_output_tokens: int | None
    top_logprobs: int | None
    instructions: str | None
    metadata: dict[str, str]
    completed_at: int | None = None
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    user: str | None = None
    object: str = "response"
    previous_response_id: None = None
    truncation: str = "disabled"
    background: bool = False
    store: bool = False


class StreamEvent(msgspec.Struct, kw_only=True):
    """One event of a stream; each type has its own of the optional fields."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
