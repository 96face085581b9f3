"""Several completions of one prompt (`n` > 1): each is a request of the engine, and one output for the caller.

The first completion keeps the request's id; the others are its forks, which share the blocks of its prompt.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from mainspring.engine.messages import EngineRequest
from mainspring.engine.output_processor import OutputKind
from mainspring.engine.outputs import CompletionOutput, RequestOutput
from mainspring.engine.sampling_params import SamplingParams


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """`seed + index`, as in vLLM (keys of neighbouring seeds are unrelated), so that completion `index` is what a
    request with that seed gives alone; past the end of 64 bits it goes on from their other end."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def params_of_choice(params: SamplingParams, index: int) -> SamplingParams:
    """What completion `index` is sampled by; the prompt's log-probabilities come once."""
    seed = seed_of_choice(params.seed, index)
    prompt_logprobs = params.prompt_logprobs if index == 0 else None
    return msgspec.structs.replace(params, n=1, seed=seed, prompt_logprobs=prompt_logprobs)


def fan_out(request: EngineRequest) -> list[EngineRequest]:
    """The engine's requests for the `n` completions of one, in order."""
    if request.params.n == 1:
        return [request]
    return [
        msgspec.structs.replace(
            request,
            request_id=request.request_id if index == 0 else f"{request.request_id}/{index}",
            params=params_of_choice(request.params, index),
            fork_of=None if index == 0 else request.request_id,
        )
        for index in range(request.params.n)
    ]


class ChoiceMerger:
    """Puts the outputs of the `n` requests of `fan_out` together again.

    Attributes:
        unfinished: ids of the engine's requests that still run.
    """

    def __init__(self, request: EngineRequest, output_kind: OutputKind) -> None:
        self._request_id = request.request_id
        self._output_kind = output_kind
        self._indices = {child.request_id: index for index, child in enumerate(fan_out(request))}
        self._first: RequestOutput | None = None
        self._completions: dict[int, CompletionOutput] = {}
        self.unfinished = set(self._indices)

    def merge(self, output: RequestOutput) -> RequestOutput | None:
        """What the caller sees of one engine request's output: a final output when all are there, else at once."""
        index = self._indices[output.request_id]
        if output.finished:
            self.unfinished.discard(output.request_id)
        for completion in output.outputs:
            completion.index = index
            self._completions[index] = completion
        if index == 0:
            self._first = output
        if self._output_kind == "delta":
            return replace(output, request_id=self._request_id, finished=not self.unfinished)
        # The prompt's side is the first request's; it comes with that one's first output.
        if self._first is None or (self._output_kind == "final" and self.unfinished):
            return None
        completions = [self._completions[i] for i in sorted(self._completions)]
        return replace(
            self._first, request_id=self._request_id, outputs=completions, finished=not self.unfinished
        )
