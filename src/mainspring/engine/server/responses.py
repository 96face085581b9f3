"""POST /v1/responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from mainspring.engine.outputs import CompletionOutput
from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.server.answers import UsageCounter, chat_logprobs
from mainspring.engine.server.async_llm import Placement
from mainspring.engine.server.chat_types import FunctionDefinition, FunctionName, NamedToolChoice
from mainspring.engine.server.conversation import ChatPrompt, Conversation, check_names, make_prompt
from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.event_stream import EventStream, NamedEvent
from mainspring.engine.server.openai_types import TokenLogprob
from mainspring.engine.server.responses_items import OutputItems, turns_of
from mainspring.engine.server.responses_types import (
    LOGPROBS,
    FunctionChoice,
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputItem,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    StreamEvent,
)
from mainspring.engine.server.service import ServedModel, Service, json_response, new_id, service_of
from mainspring.engine.server.tool_calls.events import Content, Event, Reasoning
from mainspring.errors import InvalidRequestError, MainspringError

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """The next items of a conversation, whole or as a stream of events."""
    service = service_of(request)
    model = service.check_model(body.model)
    prompt = await make_prompt(service, _conversation(body, service))
    params = prompt.held_to_its_form(_params(body))
    job = _Job(service, model, body, prompt, params, new_id("resp"), int(time.time()))
    if body.stream:
        return await EventStream.start(request, job.named_events())
    return json_response(await until_disconnect(request.receive, job.answer()))


def _params(body: ResponsesRequest) -> SamplingParams:
    """Sampling parameters; those that are not given keep their defaults. Raises: InvalidRequestError."""
    wants_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs is not None and not wants_logprobs:
        raise InvalidRequestError(f'top_logprobs needs "{LOGPROBS}" in include', "top_logprobs")
    given: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    if wants_logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if body.temperature is not None:
        given["temperature"] = body.temperature
    if body.top_p is not None:
        given["top_p"] = body.top_p
    try:
        return SamplingParams(**given)
    except InvalidRequestError as error:
        if error.param != "max_tokens":
            raise
        raise InvalidRequestError(
            str(error).replace("max_tokens", "max_output_tokens"), "max_output_tokens"
        ) from None


def _conversation(body: ResponsesRequest, service: Service) -> Conversation:
    tools = [
        FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
        for tool in body.tools or ()
    ]
    check_names(tools)
    choice: Literal["none", "auto", "required"] | NamedToolChoice
    if isinstance(body.tool_choice, FunctionChoice):
        choice = NamedToolChoice(type="function", function=FunctionName(name=body.tool_choice.name))
    else:
        choice = body.tool_choice or "auto"
    variables: dict[str, Any] = {}
    if body.reasoning is not None and body.reasoning.effort is not None:
        service.check_template_reads("reasoning_effort", "reasoning.effort")
        variables["reasoning_effort"] = body.reasoning.effort
    return Conversation(
        turns=turns_of(body.input, body.instructions),
        tools=tools,
        tool_choice=choice,
        parallel_calls=body.parallel_tool_calls is not False,
        structured=_structured(body),
        variables=variables,
    )


def _structured(body: ResponsesRequest) -> StructuredOutputsParams | None:
    form = None if body.text is None else body.text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if form.schema_ is None:
        raise InvalidRequestError(
            'text.format of the type "json_schema" needs a schema', "text.format.schema"
        )
    return StructuredOutputsParams(json=form.schema_)


@dataclass(slots=True)
class _Reader:
    """Reads the model's text as it comes: its items, and which of its tokens were thoughts."""

    items: OutputItems = field(default_factory=OutputItems)
    num_reasoning: int = 0
    pending: list[TokenLogprob] = field(default_factory=list)  # of tokens whose text is still held back

    def take(self, events: list[Event], num_tokens: int, logprobs: list[TokenLogprob]) -> list[StreamEvent]:
        """The events of further tokens."""
        self.pending += logprobs
        if any(isinstance(event, Reasoning) for event in events):
            self.num_reasoning += num_tokens
            self.pending = []
        elif events and not any(isinstance(event, Content) for event in events):
            self.pending = []
        given: list[TokenLogprob] = []
        if any(isinstance(event, Content) for event in events):
            given, self.pending = self.pending, []
        return self.items.take(events, given)


@dataclass(frozen=True, slots=True)
class _Job:
    """One request."""

    service: Service
    model: ServedModel
    body: ResponsesRequest
    prompt: ChatPrompt
    params: SamplingParams
    id: str
    created: int

    async def answer(self) -> ResponseObject:
        """The complete response."""
        async for event in self._events():
            if event.type in ("response.completed", "response.incomplete") and isinstance(
                event.response, ResponseObject
            ):
                return event.response
        raise RuntimeError("the stream of a response has ended without it")

    async def named_events(self) -> AsyncGenerator[NamedEvent, None]:
        """The events as they are sent. An error after the first ends them with a failed response."""
        number = -1
        try:
            async for event in self._events():
                number = event.sequence_number
                yield NamedEvent(event.type, msgspec.json.encode(event))
        except MainspringError as error:
            if number < 0:
                raise
            failed = self._response("failed", [])
            failed.error = ResponseError("server_error", str(error))
            event = StreamEvent(type="response.failed", sequence_number=number + 1, response=failed)
            yield NamedEvent(event.type, msgspec.json.encode(event))

    async def _events(self) -> AsyncGenerator[StreamEvent, None]:
        usage = UsageCounter([len(self.prompt.token_ids)])
        reader, parser = _Reader(), self.prompt.plan.parser()
        begun = False
        async with self.service.llm.generate(
            [self.prompt.token_ids],
            [self.params],
            stream=True,
            placement=Placement(lora_id=self.model.lora_id),
        ) as generation:
            async for _, output in generation:
                usage.add(0, 0, output)
                text = output.outputs[0]
                if not begun:
                    # Not before the engine has taken the request: a refusal has its own HTTP status.
                    begun = True
                    for kind in ("created", "in_progress"):
                        yield reader.items.event(kind, response=self._response("in_progress", []))
                found = parser.push(text.text)
                if text.finish_reason is not None:
                    found += parser.finish()
                for event in reader.take(found, len(text.token_ids), self._logprobs(text)):
                    yield event
                if text.finish_reason is not None:
                    for event in self._end(reader, usage, text.finish_reason):
                        yield event

    def _end(self, reader: _Reader, usage: UsageCounter, reason: str) -> list[StreamEvent]:
        """The last events: the last item is closed, and the response is complete or cut off."""
        status: Literal["completed", "incomplete"] = "incomplete" if reason == "length" else "completed"
        events = reader.items.finish(status)
        response = self._response(status, reader.items.items)
        if status == "incomplete":
            response.incomplete_details = Incomplete("max_output_tokens")
        counted = usage.usage()
        response.completed_at = int(time.time())
        response.usage = ResponseUsage(
            counted.prompt_tokens,
            InputDetails(counted.prompt_tokens_details.cached_tokens),
            counted.completion_tokens,
            OutputDetails(reader.num_reasoning),
            counted.total_tokens,
        )
        return [*events, reader.items.event(status, response=response)]

    def _logprobs(self, text: CompletionOutput) -> list[TokenLogprob]:
        if text.logprobs is None:
            return []
        top = self.body.top_logprobs or 0
        return chat_logprobs(text.token_ids, text.logprobs, top, self.service.llm.tokenizer).content

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"], output: list[OutputItem]
    ) -> ResponseObject:
        body = self.body
        return ResponseObject(
            id=self.id,
            created_at=self.created,
            model=self.model.name,
            status=status,
            output=output,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            tool_choice=_plain(body.tool_choice) or "auto",
            tools=[_plain(tool) for tool in body.tools or ()],
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            text=_plain(body.text) or {"format": {"type": "text"}},
            reasoning=_plain(body.reasoning) or {},
            max_output_tokens=body.max_output_tokens,
            top_logprobs=body.top_logprobs,
            instructions=body.instructions,
            metadata=body.metadata or {},
            user=body.user,
        )


def _plain(value: Any) -> Any:
    """A part of the request as the answer repeats it."""
    return value.model_dump(by_alias=True, exclude_none=True) if isinstance(value, BaseModel) else value
