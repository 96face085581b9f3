"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from mainspring.engine.outputs import CompletionOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.server.answers import UsageCounter, completion_logprobs
from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.event_stream import EventStream
from mainspring.engine.server.openai_types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from mainspring.engine.server.sampling import completion_params, for_choices
from mainspring.engine.server.service import Service, check_texts, json_response, new_id, service_of
from mainspring.errors import InvalidRequestError

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """The continuation of one or several prompts, whole or as a stream of its pieces."""
    service = service_of(request)
    service.check_model(body.model)
    params = completion_params(body)
    given = _split(body.prompt)
    n = body.n or 1
    check_texts(len(given), n)
    prompts = [await _token_ids(service, prompt) for prompt in given]
    job = _Job(
        service, body, prompts, n, for_choices(params, len(prompts), n), new_id("cmpl"), int(time.time())
    )
    if body.stream:
        return await EventStream.start(request, job.events())
    return json_response(await until_disconnect(request.receive, job.answer()))


def _split(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    several = [item for item in prompt if not isinstance(item, int)]
    return list(several) if several else [[item for item in prompt if isinstance(item, int)]]


async def _token_ids(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    if not prompt:
        # Said here, because a tokenizer that adds a first token would make one of nothing.
        raise InvalidRequestError("the prompt is empty; give at least one character", "prompt")
    return await service.llm.encode(prompt)


@dataclass(frozen=True, slots=True)
class _Job:
    """One request: choice `j` of prompt `i` stands at `i * n + j` of `params` and of the answer."""

    service: Service
    body: CompletionRequest
    prompts: list[list[int]]
    n: int
    params: list[SamplingParams]
    id: str
    created: int

    @property
    def _repeated(self) -> list[list[int]]:
        return [prompt for prompt in self.prompts for _ in range(self.n)]

    async def answer(self) -> Completion:
        """All choices, complete."""
        usage = UsageCounter([len(prompt) for prompt in self.prompts])
        choices: dict[int, CompletionChoice] = {}
        async with self.service.llm.generate(self._repeated, self.params, stream=False) as generation:
            async for index, output in generation:
                usage.add(index // self.n, output)
                choices[index] = _choice(index, output.outputs[0], _logprobs(output.outputs[0], 0))
        ordered = [choices[index] for index in sorted(choices)]
        return Completion(self.id, self.created, self.service.model_name, ordered, usage.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The JSON of each chunk: pieces of text, the last one with the reason of the end; then the usage."""
        usage = UsageCounter([len(prompt) for prompt in self.prompts])
        offsets = [0] * len(self.params)
        async with self.service.llm.generate(self._repeated, self.params, stream=True) as generation:
            async for index, output in generation:
                usage.add(index // self.n, output)
                text = output.outputs[0]
                logprobs = _logprobs(text, offsets[index])
                if logprobs is not None:
                    offsets[index] += sum(map(len, logprobs.tokens))
                if text.text or text.logprobs or text.finish_reason is not None:
                    yield self._chunk(_choice(index, text, logprobs))
        if self.body.include_usage:
            yield msgspec.json.encode(
                Completion(self.id, self.created, self.service.model_name, [], usage.usage())
            )

    def _chunk(self, choice: CompletionChoice) -> bytes:
        # With include_usage every chunk has the field, null but in the last one.
        usage = None if self.body.include_usage else UNSET
        return msgspec.json.encode(
            Completion(self.id, self.created, self.service.model_name, [choice], usage)
        )


def _choice(index: int, text: CompletionOutput, logprobs: CompletionLogprobs | None) -> CompletionChoice:
    return CompletionChoice(index, text.text, text.finish_reason, text.stop_reason, logprobs)


def _logprobs(text: CompletionOutput, offset: int) -> CompletionLogprobs | None:
    return None if text.logprobs is None else completion_logprobs(text.token_ids, text.logprobs, offset)
