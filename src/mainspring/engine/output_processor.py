"""From the engine's tokens to what a caller reads: text, stop strings, log-probabilities by token.

This is the caller's side of the engine's border: it may run in another process than the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mainspring.engine.messages import EngineRequest, TokenLogprobs, TokenOutput
from mainspring.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestOutput,
)
from mainspring.engine.stop_strings import StopStringScanner
from mainspring.errors import InvalidRequestError
from mainspring.formats.tokenizer import IncrementalDecoder, Tokenizer

# What a RequestOutput carries: all so far, what is new since the last one, or all of it once at the end.
OutputKind = Literal["cumulative", "delta", "final"]


@dataclass(slots=True)
class _RequestState:
    """What is known of one running request. `text` has been released; the scanner may hold back more."""

    request: EngineRequest
    prompt: str | None
    output_kind: OutputKind
    decoder: IncrementalDecoder | None
    scanner: StopStringScanner
    end_token_ids: frozenset[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    rope_length: int | None = None
    # How much of text and tokens the last delta has covered.
    sent_text: int = 0
    sent_tokens: int = 0


class OutputProcessor:
    """Holds the text side of every running request.

    Without a tokenizer the texts stay empty, and stop strings are refused.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _RequestState] = {}
        self._token_texts: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def add(self, request: EngineRequest, prompt: str | None, output_kind: OutputKind = "cumulative") -> None:
        """Expect tokens for this request.

        Raises:
            InvalidRequestError: the id is in use, or there are stop strings and no tokenizer to find them.
        """
        if request.request_id in self._states:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use; give another", "request_id"
            )
        params = request.params
        if self._tokenizer is None and params.stop_strings:
            raise InvalidRequestError("stop strings need a tokenizer, and this engine has none", "stop")
        self._states[request.request_id] = _RequestState(
            request=request,
            prompt=prompt,
            output_kind=output_kind,
            decoder=None
            if self._tokenizer is None
            else IncrementalDecoder(self._tokenizer, params.skip_special_tokens),
            scanner=StopStringScanner(params.stop_strings, params.include_stop_str_in_output),
            end_token_ids=frozenset((*request.eos_token_ids, *(params.stop_token_ids or ()))),
        )

    def process(self, outputs: Sequence[TokenOutput]) -> tuple[list[RequestOutput], list[str]]:
        """Take a step's outputs.

        Returns:
            What the callers are to see, and the ids of requests that a stop string has ended: the engine
            is to abort those. Outputs of requests unknown here (aborted meanwhile) are dropped.
        """
        request_outputs: list[RequestOutput] = []
        to_abort: list[str] = []
        for output in outputs:
            state = self._states.get(output.request_id)
            if state is None:
                continue
            finish_reason = self._take(state, output)
            if finish_reason is not None:
                del self._states[output.request_id]
                if output.finish_reason is None:
                    to_abort.append(output.request_id)
            if finish_reason is not None or state.output_kind != "final":
                stop_reason = (
                    state.scanner.matched if state.scanner.matched is not None else output.stop_reason
                )
                request_outputs.append(_request_output(state, finish_reason, stop_reason))
        return request_outputs, to_abort

    def abort(self, request_id: str) -> RequestOutput | None:
        """Forget a request; return its last output (finish reason "abort"), or None if it is unknown.

        The engine is to be told by the caller.
        """
        state = self._states.pop(request_id, None)
        if state is None:
            return None
        state.text += state.scanner.finish()
        return _request_output(state, "abort", None)

    def _take(self, state: _RequestState, output: TokenOutput) -> FinishReason | None:
        """Add an output's tokens to the state and return why the request has ended, if it has."""
        if output.rope_length is not None:
            state.rope_length = output.rope_length
        if output.prompt_logprobs is not None:
            state.prompt_logprobs = [
                None if entry is None else self._position_logprobs(entry) for entry in output.prompt_logprobs
            ]
        state.num_cached_tokens = max(state.num_cached_tokens, output.num_cached_tokens)
        last = len(output.token_ids) - 1
        for index, token_id in enumerate(output.token_ids):
            state.token_ids.append(token_id)
            if output.logprobs is not None:
                entry = output.logprobs[index]
                state.logprobs.append(self._position_logprobs(entry))
                state.cumulative_logprob += entry.logprobs[0]
            ends_here = index == last and output.finish_reason is not None
            self._take_text(state, token_id, output.finish_reason if ends_here else None)
            if state.scanner.matched is not None:
                return "stop"
        return output.finish_reason

    def _take_text(self, state: _RequestState, token_id: int, finish_reason: FinishReason | None) -> None:
        """Add one token's text; `finish_reason` is set if the token is the request's last."""
        decoder, params = state.decoder, state.request.params
        if decoder is None:
            return
        # The token that ends a request (end of text or a stop token) is no part of the text; the last one that a
        # grammar allows is.
        ends = finish_reason == "stop" and token_id in state.end_token_ids
        hidden = ends and not params.include_stop_str_in_output
        text = "" if hidden else decoder.push(token_id)
        if finish_reason is not None:
            text += decoder.flush()
        state.text += state.scanner.push(text, armed=len(state.token_ids) > params.min_tokens)
        if finish_reason is not None and state.scanner.matched is None:
            state.text += state.scanner.finish()

    def _position_logprobs(self, entry: TokenLogprobs) -> PositionLogprobs:
        first = entry.token_ids[0]
        position = {first: Logprob(entry.logprobs[0], entry.rank, self._token_text(first))}
        for rank, (token_id, logprob) in enumerate(
            zip(entry.token_ids[1:], entry.logprobs[1:], strict=True), start=1
        ):
            if token_id != first:
                position[token_id] = Logprob(logprob, rank, self._token_text(token_id))
        return position

    def _token_text(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return text


def _request_output(
    state: _RequestState, finish_reason: FinishReason | None, stop_reason: int | str | None
) -> RequestOutput:
    from_text = from_token = 0
    if state.output_kind == "delta":
        from_text, from_token = state.sent_text, state.sent_tokens
        state.sent_text, state.sent_tokens = len(state.text), len(state.token_ids)
    wants_logprobs = state.request.params.logprobs is not None
    completion = CompletionOutput(
        index=0,
        text=state.text[from_text:],
        token_ids=state.token_ids[from_token:],
        cumulative_logprob=state.cumulative_logprob if wants_logprobs else None,
        logprobs=state.logprobs[from_token:] if wants_logprobs else None,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )
    # In deltas the prompt's log-probabilities come once, with the first tokens.
    prompt_logprobs = state.prompt_logprobs if from_token == 0 else None
    return RequestOutput(
        request_id=state.request.request_id,
        prompt=state.prompt,
        prompt_token_ids=state.request.prompt_token_ids,
        outputs=[completion],
        prompt_logprobs=prompt_logprobs,
        finished=finish_reason is not None,
        rope_length=state.rope_length,
        num_cached_tokens=state.num_cached_tokens,
    )
