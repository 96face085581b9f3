"""A conversation, with the tools that may be called in it, becomes a prompt and a plan for reading its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.server.chat_types import (
    ChatMessage,
    FunctionDefinition,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from mainspring.engine.server.service import Service
from mainspring.engine.server.tool_calls.formats import AnswerFormat, AnswerPlan, prompt_opens_reasoning
from mainspring.engine.server.tool_calls.schema import (
    arguments_schema,
    calls_or_answer_grammar,
    calls_schema,
)
from mainspring.engine.server.tool_calls.strict import StrictFunction, strict_grammar
from mainspring.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What the chat routes share.

    Attributes:
        turns: the messages as chat templates expect them.
        tool_choice: "none", "auto", "required", or the one function that must be called.
        structured: what the answer's text must be, besides calls.
        variables: handed to the chat template.
    """

    turns: list[dict[str, Any]]
    tools: Sequence[FunctionDefinition] = ()
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice = "auto"
    parallel_calls: bool = True
    structured: StructuredOutputsParams | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt's token ids, how its answers are to be read, and what holds the model to a form."""

    token_ids: list[int]
    plan: AnswerPlan
    structured: StructuredOutputsParams | None
    keep_special_tokens: bool

    def held_to_its_form(self, params: SamplingParams) -> SamplingParams:
        """The parameters of an answer to this prompt."""
        if self.keep_special_tokens:
            params = msgspec.structs.replace(params, skip_special_tokens=False)
        return msgspec.structs.replace(params, structured_outputs=self.structured)


def turn_of(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it. OpenAI's "developer" is what models were taught as "system".

    Raises: InvalidRequestError, if a call's arguments are not JSON.
    """
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": "" if message.content is None else message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning_content is not None:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": function_of(call.function.name, call.function.arguments),
            }
            for call in message.tool_calls
        ]
    return turn


def function_of(name: str, arguments: str) -> dict[str, Any]:
    """A call as templates expect it: they write the arguments as JSON themselves, so they get them as values.

    Raises: InvalidRequestError, if they are not JSON.
    """
    try:
        return {"name": name, "arguments": json.loads(arguments) if arguments.strip() else {}}
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"the arguments of a call of {name!r} are not JSON: {error}", "messages"
        ) from error


def structured_of(form: ResponseFormat | None) -> StructuredOutputsParams | None:
    """What a response_format asks for.

    Raises: InvalidRequestError.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object" or form.json_schema is None or form.json_schema.schema_ is None:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=form.json_schema.schema_)


def functions_of(tools: Sequence[Tool] | None) -> list[FunctionDefinition]:
    """The functions of a request's tools. Raises: InvalidRequestError, if two have one name."""
    functions = [tool.function for tool in tools or ()]
    check_names(functions)
    return functions


def check_names(functions: Sequence[FunctionDefinition]) -> None:
    """Refuses functions of which two have one name."""
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            raise InvalidRequestError(f"tools has the function {function.name!r} more than once", "tools")
        seen.add(function.name)


async def make_prompt(service: Service, chat: Conversation) -> ChatPrompt:
    """Renders the conversation and plans how its answers are read.

    Raises:
        InvalidRequestError: the tools do not go together with the rest, or with this model.
        ChatTemplateError, TokenizerError.
    """
    tokenizer = service.llm.tokenizer
    tokens = (tokenizer.id_to_token(token_id) for token_id in tokenizer.special_token_ids)
    special = {token for token in tokens if token}
    mode, names, structured = _calls(chat, service.answer_format, special)
    tools = [_described(function) for function in chat.tools] if mode != "text" else None
    text = await asyncio.to_thread(
        tokenizer.apply_chat_template,
        chat.turns,
        tools=tools,
        add_generation_prompt=chat.add_generation_prompt,
        template_variables=chat.variables,
    )
    # The template has written the special tokens itself.
    token_ids = await service.llm.encode(text, add_special_tokens=False)
    form = service.answer_format
    plan = AnswerPlan(
        mode=mode,
        functions={function.name: function.parameters for function in chat.tools if function.name in names},
        tools=form.tools,
        # JSON begins at once: there is no room for thoughts.
        reasons=form.reasons and (structured is None or not _is_json(structured)),
        opened=prompt_opens_reasoning(text),
    )
    return ChatPrompt(token_ids, plan, structured, keep_special_tokens=not special.isdisjoint(plan.marks))


def _calls(
    chat: Conversation, form: AnswerFormat, special: Collection[str]
) -> tuple[Literal["text", "auto", "required", "named"], tuple[str, ...], StructuredOutputsParams | None]:
    """How calls are to be read, the functions that may be called, and what holds the model to a form."""
    names = tuple(function.name for function in chat.tools)
    if not chat.tools:
        if chat.tool_choice not in ("none", "auto"):
            raise InvalidRequestError("tool_choice asks for a call, but there are no tools", "tool_choice")
        return "text", (), chat.structured
    if chat.tool_choice == "none":
        return "text", (), chat.structured
    if not form.presents_tools:
        raise InvalidRequestError(
            "this model's chat template does not show tools to the model; leave tools out, or start the server "
            "with a template that does (--chat-template)",
            "tools",
        )
    functions = [(function.name, function.parameters) for function in chat.tools]
    if chat.structured is not None and chat.tool_choice != "auto":
        raise InvalidRequestError(
            "an answer cannot both be held to a form and be a call; leave out the form, or set tool_choice to "
            '"auto" or "none"',
            "tool_choice",
        )
    if chat.tool_choice == "auto":
        if form.tools is None:
            raise InvalidRequestError(
                'this model\'s format of calls is not known; set tool_choice to "required" or to a function, or '
                "start the server with --tool-parser",
                "tools",
            )
        if chat.structured is None and any(function.strict for function in chat.tools):
            return "auto", names, _strict(chat, form, special)
        if chat.structured is None or not _is_json(chat.structured):
            return "auto", names, chat.structured
        return "auto", names, _calls_or_json(chat, functions, form)
    try:
        if chat.tool_choice == "required":
            return "required", names, _json(calls_schema(functions, parallel=chat.parallel_calls))
        wanted = chat.tool_choice.function.name
        for function in chat.tools:
            if function.name == wanted:
                return "named", (wanted,), _json(arguments_schema(function.parameters))
    except RecursionError as error:
        raise InvalidRequestError("the parameters of a tool are nested too deeply", "tools") from error
    raise InvalidRequestError(
        f"tool_choice names {wanted!r}, but the tools are {', '.join(map(repr, names))}", "tool_choice"
    )


def _strict(chat: Conversation, form: AnswerFormat, special: Collection[str]) -> StructuredOutputsParams:
    """Free text, in which calls are held to the schemas of the strict functions."""
    functions = [StrictFunction(f.name, f.parameters, bool(f.strict)) for f in chat.tools]
    try:
        grammar = strict_grammar(form.tools, functions, parallel=chat.parallel_calls, special=special)
    except RecursionError as error:
        raise InvalidRequestError("the parameters of a tool are nested too deeply", "tools") from error
    return StructuredOutputsParams(grammar=grammar)


def _calls_or_json(
    chat: Conversation, functions: Sequence[tuple[str, dict[str, Any] | None]], form: AnswerFormat
) -> StructuredOutputsParams:
    """A grammar of calls in the model's own format or an answer in the wanted form."""
    if form.tools != "hermes":
        raise InvalidRequestError(
            "with this model's format of calls, an answer cannot be held to a form and be free to call tools; leave "
            'out tools or the form, or set tool_choice to "none"',
            "tool_choice",
        )
    schema: Any = {"type": "object"}
    if chat.structured is not None and chat.structured.json is not None:
        given = chat.structured.json
        schema = json.loads(given) if isinstance(given, str) else given
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            "beside tools, the form of the answer must be a schema that is an object", "tools"
        )
    try:
        grammar = calls_or_answer_grammar(functions, schema, parallel=chat.parallel_calls)
    except RecursionError as error:
        raise InvalidRequestError("the parameters of a tool are nested too deeply", "tools") from error
    return StructuredOutputsParams(grammar=grammar)


def _is_json(structured: StructuredOutputsParams) -> bool:
    return structured.json is not None or bool(structured.json_object)


def _json(schema: dict[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema)


def _described(function: FunctionDefinition) -> dict[str, Any]:
    """A tool as templates show it."""
    described: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        described["description"] = function.description
    described["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": described}
