"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from mainspring.engine.outputs import CompletionOutput, RequestOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.server.answers import UsageCounter, completion_logprobs, prompt_logprobs
from mainspring.engine.server.async_llm import Generation
from mainspring.engine.server.completion_types import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    split_prompts,
)
from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.event_stream import EventStream
from mainspring.engine.server.fill_in_middle import FillInMiddle
from mainspring.engine.server.openai_types import CompletionLogprobs, Usage
from mainspring.engine.server.sampling import completion_params, for_choices, placement_of
from mainspring.engine.server.service import ServedModel, Service, json_response, new_id, service_of
from mainspring.errors import InvalidRequestError

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt. `text`: as an echo shows it; the first `num_hidden` ids are not in it."""

    token_ids: list[int]
    text: str
    num_hidden: int


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """The continuation of one or several prompts, whole or as a stream of its pieces."""
    service = service_of(request)
    model = service.check_model(body.model)
    params = completion_params(body)
    given = split_prompts(body.prompt)
    n = service.check_choices(len(given), body.n)
    if body.suffix:
        marks = FillInMiddle.of(service.llm.tokenizer)
        params = msgspec.structs.replace(
            params, stop_token_ids=[*(params.stop_token_ids or ()), *marks.stop_token_ids]
        )
    prompts = [await _prompt(service, prompt, body.suffix or "") for prompt in given]
    job = _Job(
        service,
        model,
        body,
        prompts,
        n,
        for_choices(params, len(prompts), n),
        new_id("cmpl"),
        int(time.time()),
    )
    if body.stream:
        return await EventStream.start(request, job.events())
    return json_response(await until_disconnect(request.receive, job.answer()))


async def _prompt(service: Service, prompt: str | list[int], suffix: str) -> _Prompt:
    if not prompt:
        # Said here, because a tokenizer that adds a first token would make one of nothing.
        raise InvalidRequestError("the prompt is empty; give at least one token", "prompt")
    tokenizer = service.llm.tokenizer
    if isinstance(prompt, list):
        # The engine refuses ids that it does not have; none of them is read before.
        known = all(0 <= token_id < service.llm.limits.vocab_size for token_id in prompt)
        text = tokenizer.decode(prompt, skip_special_tokens=False) if known else ""
    else:
        text = prompt
    if suffix:
        prefix = (
            prompt if isinstance(prompt, list) else await service.llm.encode(text, add_special_tokens=False)
        )
        before = await service.llm.encode("")
        after = await service.llm.encode(suffix, add_special_tokens=False)
        token_ids = FillInMiddle.of(tokenizer).prompt(before, prefix, after)
        return _Prompt(token_ids, text, len(token_ids))
    if isinstance(prompt, list):
        return _Prompt(prompt, text, 0)
    token_ids = await service.llm.encode(prompt)
    num_hidden = 0
    for token_id in token_ids:
        token = tokenizer.decode([token_id], skip_special_tokens=False)
        if token_id not in tokenizer.special_token_ids or text.startswith(token):
            break
        num_hidden += 1
    return _Prompt(token_ids, text, num_hidden)


@dataclass(slots=True)
class _Progress:
    """What has been sent of one streamed choice. `offset`: of its next token's text."""

    offset: int = 0
    begun: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """One request: choice `j` of prompt `i` stands at `i * n + j` of `params` and of the answer."""

    service: Service
    model: ServedModel
    body: CompletionRequest
    prompts: list[_Prompt]
    n: int
    params: list[SamplingParams]
    id: str
    created: int

    def _generate(self, *, stream: bool) -> Generation:
        repeated = [prompt.token_ids for prompt in self.prompts for _ in range(self.n)]
        return self.service.llm.generate(
            repeated,
            self.params,
            stream=stream,
            choices=self.n,
            placement=placement_of(self.body, self.model.lora_id),
        )

    @property
    def _usage(self) -> UsageCounter:
        return UsageCounter([len(prompt.token_ids) for prompt in self.prompts])

    async def answer(self) -> Completion:
        """All choices, complete."""
        usage = self._usage
        choices: dict[int, CompletionChoice] = {}
        async with self._generate(stream=False) as generation:
            async for index, output in generation:
                self._count(usage, index, output)
                choices[index] = self._choice(index, output, _Progress())
        ordered = [choices[index] for index in sorted(choices)]
        return Completion(self.id, self.created, self.model.name, ordered, usage.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The JSON of each chunk: pieces of text, the last one with the reason of the end; then the usage."""
        usage = self._usage
        progress = [_Progress() for _ in self.params]
        async with self._generate(stream=True) as generation:
            async for index, output in generation:
                self._count(usage, index, output)
                choice = self._choice(index, output, progress[index])
                if choice.text or choice.logprobs or choice.token_ids or choice.finish_reason is not None:
                    yield self._encode([choice], usage.usage() if self.body.continuous_usage else None)
        if self.body.include_usage:
            yield self._encode([], usage.usage())

    def _count(self, usage: UsageCounter, index: int, output: RequestOutput) -> None:
        usage.add(index // self.n, index % self.n, output, answered=not self._only_echoes)

    @property
    def _only_echoes(self) -> bool:
        """The one token that the engine generates is not wanted."""
        return bool(self.body.echo) and self.body.max_tokens == 0

    def _choice(self, index: int, output: RequestOutput, progress: _Progress) -> CompletionChoice:
        """An output as a choice, or as what a chunk adds to it; an echo goes before its first text."""
        prompt, text = self.prompts[index // self.n], output.outputs[0]
        choice = CompletionChoice(index, text.text, text.finish_reason, text.stop_reason)
        choice.logprobs = self._logprobs(text, progress)
        choice.token_ids = self._ids(text.token_ids)
        if self._only_echoes:
            choice = CompletionChoice(index, "", text.finish_reason, token_ids=self._ids([]))
        if not progress.begun:
            progress.begun = True
            choice.prompt_token_ids = self._ids(prompt.token_ids)
            if self.body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(output)
            if self.body.echo:
                self._echo(choice, prompt, output, progress)
        return choice

    def _echo(
        self, choice: CompletionChoice, prompt: _Prompt, output: RequestOutput, progress: _Progress
    ) -> None:
        """Puts the prompt before what there is of a choice."""
        choice.text = prompt.text + choice.text
        progress.offset += len(prompt.text)
        if output.prompt_logprobs is None or self.body.logprobs is None:
            return
        whole = completion_logprobs(
            prompt.token_ids,
            output.prompt_logprobs,
            0,
            self.service.llm.tokenizer,
            num_hidden=prompt.num_hidden,
        )
        if choice.logprobs is not None:
            whole.tokens += choice.logprobs.tokens
            whole.token_logprobs += choice.logprobs.token_logprobs
            whole.top_logprobs += choice.logprobs.top_logprobs
            whole.text_offset += [offset + len(prompt.text) for offset in choice.logprobs.text_offset]
        choice.logprobs = whole

    def _logprobs(self, text: CompletionOutput, progress: _Progress) -> CompletionLogprobs | None:
        if text.logprobs is None:
            return None
        logprobs = completion_logprobs(
            text.token_ids, text.logprobs, progress.offset, self.service.llm.tokenizer
        )
        progress.offset += sum(map(len, logprobs.tokens))
        return logprobs

    def _encode(self, choices: list[CompletionChoice], count: Usage | None) -> bytes:
        # With include_usage every chunk has the field, null but in the last one.
        usage = count if count is not None or self.body.include_usage else UNSET
        return msgspec.json.encode(Completion(self.id, self.created, self.model.name, choices, usage))

    def _ids(self, token_ids: Sequence[int]) -> list[int] | UnsetType:
        return list(token_ids) if self.body.return_token_ids else UNSET
