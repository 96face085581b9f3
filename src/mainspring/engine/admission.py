"""What a request must satisfy before the engine takes it. Clients and the engine use the same check.

Needs no PyTorch, so that the HTTP frontend refuses a bad request without asking the engine.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence

from mainspring.engine.messages import EngineLimits, EngineRequest, Pooling
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import InvalidRequestError, RequestTooLongError


def make_request(
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    limits: EngineLimits,
    eos_token_ids: Sequence[int],
    *,
    pooling: Pooling | None = None,
    lora_id: int = 0,
) -> EngineRequest:
    """Resolve `max_tokens` and check the request. With `pooling` nothing is generated. lora_id: 0 for no adapter.

    The completion is capped at the context's end, as in vLLM (finish reason "length"). A request whose
    prompt leaves no room for one token, or that the whole KV cache could not hold, is refused.

    Raises:
        RequestTooLongError: too long for the context or for the cache.
        InvalidRequestError: an empty prompt, a token id outside the vocabulary, too many logprobs.
    """
    try:
        token_ids = array("q", prompt_token_ids).tolist()
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"the prompt must hold token ids only: {error}", "prompt") from error
    room = limits.max_model_len - len(token_ids)
    if params.max_tokens is None:
        max_tokens = min(room, limits.max_cache_tokens - len(token_ids) + 1)
    else:
        max_tokens = min(room, params.max_tokens)
    request = EngineRequest(
        request_id,
        token_ids,
        params,
        tuple(eos_token_ids),
        max_tokens=max(1, max_tokens) if pooling is None else 0,
        pooling=pooling,
        lora_id=lora_id,
    )
    check_request(request, limits)
    return request


def check_request(request: EngineRequest, limits: EngineLimits) -> None:
    """Raise what `make_request` documents if the request cannot be served; return None if it can."""
    params = request.params
    if not request.prompt_token_ids:
        raise InvalidRequestError("the prompt is empty; give at least one token", "prompt")
    _check_token_ids("prompt", request.prompt_token_ids, limits)
    for name, token_ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        if token_ids:
            _check_token_ids(name, token_ids, limits)
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None and value > limits.max_logprobs:
            raise InvalidRequestError(f"{name} is {value}, but at most {limits.max_logprobs} are given", name)
    if not 0 <= request.lora_id <= limits.num_adapters:
        raise InvalidRequestError(
            f"there is no adapter {request.lora_id}; this engine has {limits.num_adapters}", "lora"
        )
    num_prompt = len(request.prompt_token_ids)
    least = 1 if request.pooling is None else 0
    if num_prompt + least > limits.max_model_len:
        raise RequestTooLongError(
            f"the prompt has {num_prompt} tokens, but the model's context is {limits.max_model_len} tokens, "
            "prompt and completion together; shorten the prompt",
            "prompt",
        )
    if request.max_tokens < least or num_prompt + request.max_tokens > limits.max_model_len:
        raise RequestTooLongError(
            f"{num_prompt} prompt tokens and max_tokens={request.max_tokens} do not fit the model's context "
            f"of {limits.max_model_len} tokens; lower max_tokens",
            "max_tokens",
        )
    # The last generated token is never fed back, so it needs no place in the cache.
    needed = num_prompt + max(0, request.max_tokens - 1)
    if needed > limits.max_cache_tokens:
        raise RequestTooLongError(
            f"the request needs {needed} tokens of KV cache ({num_prompt} of the prompt, max_tokens="
            f"{request.max_tokens}), but the whole cache holds {limits.max_cache_tokens}; shorten the "
            "prompt, lower max_tokens, or start the engine with a larger kv_cache_bytes",
            "max_tokens" if num_prompt <= limits.max_cache_tokens else "prompt",
        )


def _check_token_ids(param: str, token_ids: Collection[int], limits: EngineLimits) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequestError(
                f"{param} holds the token id {token_id}, but ids lie between 0 and {limits.vocab_size - 1}",
                param,
            )
