"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from mainspring.engine.outputs import CompletionOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.server.answers import UsageCounter, chat_logprobs
from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.event_stream import EventStream
from mainspring.engine.server.openai_types import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from mainspring.engine.server.sampling import chat_params, for_choices
from mainspring.engine.server.service import Service, json_response, new_id, service_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """The next message of a conversation, whole or as a stream of its pieces."""
    service = service_of(request)
    service.check_model(body.model)
    params = chat_params(body)
    prompt = await _prompt(service, body.messages)
    job = _Job(
        service, body, prompt, for_choices(params, 1, body.n or 1), new_id("chatcmpl"), int(time.time())
    )
    if body.stream:
        return await EventStream.start(request, job.events())
    return json_response(await until_disconnect(request.receive, job.answer()))


async def _prompt(service: Service, messages: list[ChatMessage]) -> list[int]:
    """The conversation as token ids, by the model's chat template."""
    turns = [_turn(message) for message in messages]
    tokenizer = service.llm.tokenizer
    text = await asyncio.to_thread(tokenizer.apply_chat_template, turns, add_generation_prompt=True)
    # The template has written the special tokens itself.
    return await service.llm.encode(text, add_special_tokens=False)


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it. OpenAI's "developer" is what models were taught as "system"."""
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


@dataclass(frozen=True, slots=True)
class _Job:
    """One request: its prompt, once a choice with that choice's parameters."""

    service: Service
    body: ChatCompletionRequest
    prompt: list[int]
    params: list[SamplingParams]
    id: str
    created: int

    async def answer(self) -> ChatCompletion:
        """All choices, complete."""
        usage = UsageCounter([len(self.prompt)])
        choices: dict[int, ChatChoice] = {}
        prompts = [self.prompt] * len(self.params)
        async with self.service.llm.generate(prompts, self.params, stream=False) as generation:
            async for index, output in generation:
                usage.add(0, output)
                text = output.outputs[0]
                choices[index] = ChatChoice(
                    index=index,
                    message=AssistantMessage(text.text),
                    finish_reason=text.finish_reason,
                    stop_reason=text.stop_reason,
                    logprobs=self._logprobs(text),
                )
        ordered = [choices[index] for index in sorted(choices)]
        return ChatCompletion(self.id, self.created, self.service.model_name, ordered, usage.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The JSON of each chunk: role, pieces of text, the reason of the end, and the usage if asked for."""
        usage = UsageCounter([len(self.prompt)])
        prompts = [self.prompt] * len(self.params)
        begun: set[int] = set()
        async with self.service.llm.generate(prompts, self.params, stream=True) as generation:
            async for index, output in generation:
                usage.add(0, output)
                if index not in begun:
                    begun.add(index)
                    yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
                text = output.outputs[0]
                if text.text or text.logprobs:
                    logprobs = self._logprobs(text)
                    yield self._chunk(ChatChunkChoice(index, ChatDelta(content=text.text), logprobs=logprobs))
                if text.finish_reason is not None:
                    yield self._chunk(
                        ChatChunkChoice(
                            index, ChatDelta(), finish_reason=text.finish_reason, stop_reason=text.stop_reason
                        )
                    )
        if self.body.include_usage:
            yield msgspec.json.encode(
                ChatCompletionChunk(self.id, self.created, self.service.model_name, [], usage.usage())
            )

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        # With include_usage every chunk has the field, null but in the last one.
        usage = None if self.body.include_usage else UNSET
        return msgspec.json.encode(
            ChatCompletionChunk(self.id, self.created, self.service.model_name, [choice], usage)
        )

    def _logprobs(self, text: CompletionOutput) -> ChatLogprobs | None:
        if text.logprobs is None:
            return None
        top = self.body.top_logprobs or 0
        return chat_logprobs(text.token_ids, text.logprobs, top, self.service.llm.tokenizer)
