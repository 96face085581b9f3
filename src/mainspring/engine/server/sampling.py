"""From a request's JSON to the engine's sampling parameters."""

from __future__ import annotations

import msgspec

from mainspring.engine.choices import seed_of_choice
from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.server.async_llm import Placement
from mainspring.engine.server.chat_types import ChatCompletionRequest
from mainspring.engine.server.completion_types import CompletionRequest
from mainspring.engine.server.openai_types import GenerationRequest
from mainspring.errors import InvalidRequestError

# What both APIs hand on under the name that SamplingParams has for it.
_SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def completion_params(body: CompletionRequest) -> SamplingParams:
    """Sampling parameters of a completion; at most 16 tokens unless it says otherwise, as at OpenAI.

    Raises: InvalidRequestError, which names the field.
    """
    if body.max_tokens == 0 and body.echo:
        # The engine always generates; the answer leaves that token out.
        body = body.model_copy(update={"max_tokens": 1})
    prompt_logprobs = body.logprobs if body.echo else None
    if body.prompt_logprobs is not None:
        if prompt_logprobs not in (None, body.prompt_logprobs):
            raise InvalidRequestError(
                f"prompt_logprobs ({body.prompt_logprobs}) and echo with logprobs ({body.logprobs}) both ask for the "
                "prompt's log-probabilities; send one of them",
                "prompt_logprobs",
            )
        prompt_logprobs = body.prompt_logprobs
    _check_prompt_logprobs(body)
    return msgspec.structs.replace(
        _shared_params(body, max_tokens=16), logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
    )


def chat_params(body: ChatCompletionRequest) -> SamplingParams:
    """Sampling parameters of a chat completion; its length is open unless it says otherwise.

    Raises: InvalidRequestError, which names the field.
    """
    if body.max_completion_tokens is not None:
        if body.max_tokens is not None and body.max_tokens != body.max_completion_tokens:
            raise InvalidRequestError(
                f"max_tokens ({body.max_tokens}) and max_completion_tokens ({body.max_completion_tokens}) "
                "contradict each other; send one of them",
                "max_completion_tokens",
            )
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    _check_prompt_logprobs(body)
    return msgspec.structs.replace(
        _shared_params(body, max_tokens=None), logprobs=logprobs, prompt_logprobs=body.prompt_logprobs
    )


def _check_prompt_logprobs(body: GenerationRequest) -> None:
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError(
            "prompt_logprobs are not given in a stream; leave them out, or set stream to false",
            "prompt_logprobs",
        )


def _shared_params(body: GenerationRequest, *, max_tokens: int | None) -> SamplingParams:
    """The shared fields; those that are not given (or null) keep the defaults of SamplingParams."""
    given = {name: getattr(body, name) for name in _SHARED if getattr(body, name) is not None}
    structured = None
    if body.structured_outputs is not None:
        structured = StructuredOutputsParams(**body.structured_outputs.model_dump(by_alias=True))
    return SamplingParams(**{"max_tokens": max_tokens, "structured_outputs": structured, **given})


def placement_of(body: GenerationRequest, lora_id: int) -> Placement:
    """How the request stands among others. Raises: InvalidRequestError."""
    priority = body.priority or 0
    if not -(2**31) <= priority < 2**31:
        raise InvalidRequestError(f"priority is {priority}, but must fit in 32 bits", "priority")
    return Placement(priority, body.cache_salt, lora_id)


def for_choices(params: SamplingParams, prompts: int, n: int) -> list[SamplingParams]:
    """Parameters of choice `j` of prompt `i`, at `i * n + j`."""
    return [msgspec.structs.replace(params, seed=seed_of_choice(params.seed, j)) for j in range(n)] * prompts
