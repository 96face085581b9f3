"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from mainspring.engine.outputs import CompletionOutput
from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.server.answers import UsageCounter, chat_logprobs, prompt_logprobs
from mainspring.engine.server.async_llm import Generation
from mainspring.engine.server.chat_types import (
    AnsweredToolCall,
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ToolCallDelta,
)
from mainspring.engine.server.conversation import (
    ChatPrompt,
    Conversation,
    functions_of,
    make_prompt,
    structured_of,
    turn_of,
)
from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.event_stream import EventStream
from mainspring.engine.server.openai_types import ChatLogprobs, PromptLogprobs, Usage
from mainspring.engine.server.sampling import chat_params, for_choices, placement_of
from mainspring.engine.server.service import ServedModel, Service, json_response, new_id, service_of
from mainspring.engine.server.tool_calls.events import (
    CallArguments,
    CallBegin,
    Content,
    Event,
    Parser,
    Reasoning,
    parse_whole,
)
from mainspring.engine.server.tool_calls.formats import AnswerPlan
from mainspring.errors import InvalidRequestError

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """The next message of a conversation, whole or as a stream of its pieces."""
    service = service_of(request)
    model = service.check_model(body.model)
    n = service.check_choices(1, body.n)
    params = chat_params(body)
    prompt = await make_prompt(service, _conversation(body, service, params.structured_outputs))
    params = prompt.held_to_its_form(params)
    job = _Job(service, model, body, prompt, for_choices(params, 1, n), new_id("chatcmpl"), int(time.time()))
    if body.stream:
        return await EventStream.start(request, job.events())
    return json_response(await until_disconnect(request.receive, job.answer()))


def _conversation(
    body: ChatCompletionRequest, service: Service, structured: StructuredOutputsParams | None
) -> Conversation:
    """The request's conversation. `structured`: what vLLM's field of that name asks for."""
    form = structured_of(body.response_format)
    if form is not None and structured is not None:
        raise InvalidRequestError(
            "response_format and structured_outputs both give the answer a form; send one of them",
            "structured_outputs",
        )
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        service.check_template_reads("reasoning_effort")
        variables["reasoning_effort"] = body.reasoning_effort
    return Conversation(
        turns=[turn_of(message) for message in body.messages],
        tools=functions_of(body.tools),
        tool_choice=body.tool_choice or "auto",
        parallel_calls=body.parallel_tool_calls is not False,
        structured=form or structured,
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
    )


@dataclass(slots=True)
class _Choice:
    """One answer that is being streamed."""

    parser: Parser
    begun: bool = False
    calls: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """One request: its prompt, once a choice with that choice's parameters."""

    service: Service
    model: ServedModel
    body: ChatCompletionRequest
    prompt: ChatPrompt
    params: list[SamplingParams]
    id: str
    created: int

    def _generate(self, *, stream: bool) -> Generation:
        n = len(self.params)
        return self.service.llm.generate(
            [self.prompt.token_ids] * n,
            self.params,
            stream=stream,
            choices=n,
            placement=placement_of(self.body, self.model.lora_id),
        )

    async def answer(self) -> ChatCompletion:
        """All choices, complete."""
        usage = UsageCounter([len(self.prompt.token_ids)])
        choices: dict[int, ChatChoice] = {}
        of_prompt: PromptLogprobs | UnsetType = UNSET
        async with self._generate(stream=False) as generation:
            async for index, output in generation:
                usage.add(0, index, output)
                of_prompt = prompt_logprobs(output)
                choices[index] = self._choice(index, output.outputs[0])
        return ChatCompletion(
            self.id,
            self.created,
            self.model.name,
            [choices[index] for index in sorted(choices)],
            usage.usage(),
            prompt_token_ids=self._ids(self.prompt.token_ids),
            prompt_logprobs=of_prompt,
        )

    def _choice(self, index: int, text: CompletionOutput) -> ChatChoice:
        plan = self.prompt.plan
        answer = parse_whole(plan.parser(), text.text)
        message = AssistantMessage(answer.content)
        if answer.reasoning:
            message.reasoning_content = answer.reasoning
        if answer.calls:
            message.content = answer.content or None
            message.tool_calls = [
                AnsweredToolCall(new_id("call"), CalledFunction(call.name, call.arguments))
                for call in answer.calls
            ]
        return ChatChoice(
            index=index,
            message=message,
            finish_reason=_finish_reason(text.finish_reason, plan, len(answer.calls)),
            stop_reason=text.stop_reason,
            logprobs=self._logprobs(text),
            token_ids=self._ids(text.token_ids),
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The JSON of each chunk: role, pieces of text, the reason of the end, and the usage if asked for."""
        usage = UsageCounter([len(self.prompt.token_ids)])
        choices = [_Choice(self.prompt.plan.parser()) for _ in self.params]
        async with self._generate(stream=True) as generation:
            async for index, output in generation:
                usage.add(0, index, output)
                for chunk in self._chunks(index, choices[index], output.outputs[0]):
                    yield self._encode([chunk], usage.usage() if self.body.continuous_usage else None)
        if self.body.include_usage:
            yield self._encode([], usage.usage())

    def _chunks(self, index: int, choice: _Choice, text: CompletionOutput) -> list[ChatChunkChoice]:
        """What an output adds to its choice. Log-probabilities and token ids go with the first of its chunks."""
        events = choice.parser.push(text.text)
        if text.finish_reason is not None:
            events += choice.parser.finish()
        choice.calls += sum(isinstance(event, CallBegin) for event in events)
        chunks = [ChatChunkChoice(index, delta) for delta in map(_delta, events)]
        if not chunks and (text.logprobs or (self.body.return_token_ids and text.token_ids)):
            # The text of these tokens is still held back.
            chunks.append(ChatChunkChoice(index, ChatDelta(content="")))
        if chunks:
            chunks[0].logprobs = self._logprobs(text)
            chunks[0].token_ids = self._ids(text.token_ids)
        if not choice.begun:
            choice.begun = True
            chunks.insert(0, ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
        if text.finish_reason is not None:
            reason = _finish_reason(text.finish_reason, self.prompt.plan, choice.calls)
            chunks.append(
                ChatChunkChoice(index, ChatDelta(), finish_reason=reason, stop_reason=text.stop_reason)
            )
        return chunks

    def _encode(self, choices: list[ChatChunkChoice], count: Usage | None) -> bytes:
        # With include_usage every chunk has the field, null but in the last one.
        usage = count if count is not None or self.body.include_usage else UNSET
        return msgspec.json.encode(
            ChatCompletionChunk(self.id, self.created, self.model.name, choices, usage)
        )

    def _logprobs(self, text: CompletionOutput) -> ChatLogprobs | None:
        if text.logprobs is None:
            return None
        top = self.body.top_logprobs or 0
        return chat_logprobs(text.token_ids, text.logprobs, top, self.service.llm.tokenizer)

    def _ids(self, token_ids: Sequence[int]) -> list[int] | UnsetType:
        return list(token_ids) if self.body.return_token_ids else UNSET


def _finish_reason(reason: str | None, plan: AnswerPlan, calls: int) -> str | None:
    """As at OpenAI: a call that the user forced by name ends with "stop" like a text."""
    return "tool_calls" if calls and reason == "stop" and plan.mode != "named" else reason


def _delta(event: Event) -> ChatDelta:
    match event:
        case Reasoning(text):
            return ChatDelta(reasoning_content=text)
        case Content(text):
            return ChatDelta(content=text)
        case CallBegin(index, name):
            call = ToolCallDelta(index, CalledFunction(name, ""), id=new_id("call"), type="function")
            return ChatDelta(tool_calls=[call])
        case CallArguments(index, text):
            return ChatDelta(tool_calls=[ToolCallDelta(index, CalledFunction(arguments=text))])
