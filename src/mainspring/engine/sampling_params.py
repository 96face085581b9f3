"""How one request is to be sampled: names and defaults as in vLLM. Needs no PyTorch, travels as msgpack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from mainspring.errors import InvalidRequestError


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Validated on construction, also when decoded from a message.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_p: keep the smallest set of most likely tokens whose mass reaches it, in (0, 1].
        top_k: keep that many most likely tokens; 0 or -1 keeps all. Applied before `top_p`, which then
            works on the renormalised rest, as in vLLM.
        min_p: keep tokens at least that fraction as likely as the likeliest, in [0, 1].
        seed: the same seed gives the same tokens in any batch; without one the engine draws it.
        max_tokens: generate at most that many tokens; None means as far as context and cache reach.
        min_tokens: no end of text, stop token or stop string before that many tokens.
        stop: strings that end the text; it is cut just before the earliest one.
        stop_token_ids: token ids that end the request besides the model's own end-of-text tokens.
        ignore_eos: generate past the model's end-of-text tokens.
        logprobs: report the log-probability of every generated token and of that many most likely ones
            (0: the generated token only), from the raw logits: before temperature, masks and truncation.
        prompt_logprobs: the same for the prompt's tokens (the first has none).
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or the stop token's text) at the end of the text.

    Raises:
        InvalidRequestError: a value is of the wrong type or out of range; `param` names the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, low=0.0)
        _require_number("top_p", self.top_p, low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError(
                "top_p is 0, but must be above 0 and at most 1; use temperature=0 for greedy sampling",
                "top_p",
            )
        _require_number("min_p", self.min_p, low=0.0, high=1.0)
        _require_int("top_k", self.top_k, low=-1)
        _require_int("min_tokens", self.min_tokens, low=0)
        if self.seed is not None:
            _require_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, low=1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"min_tokens is {self.min_tokens}, above max_tokens, which is {self.max_tokens}",
                    "min_tokens",
                )
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, low=0)
        if self.prompt_logprobs is not None:
            _require_int("prompt_logprobs", self.prompt_logprobs, low=0)
        self._check_stops()

    def _check_stops(self) -> None:
        for string in self.stop_strings:
            if not isinstance(string, str):
                raise InvalidRequestError(
                    f"stop must be a string or a list of strings, not {self.stop!r}", "stop"
                )
            if not string:
                raise InvalidRequestError(
                    "stop holds an empty string, which would end every text at once", "stop"
                )
        if self.stop_token_ids is not None:
            if not isinstance(self.stop_token_ids, Sequence):
                raise InvalidRequestError(
                    f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}",
                    "stop_token_ids",
                )
            for token_id in self.stop_token_ids:
                _require_int("stop_token_ids", token_id, low=0)

    @property
    def greedy(self) -> bool:
        """The likeliest token is always taken: no randomness is involved."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, Sequence):
            raise InvalidRequestError(
                f"stop must be a string or a list of strings, not {self.stop!r}", "stop"
            )
        return tuple(self.stop)


def _require_number(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name} must be a number, not {value!r}", name)
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise InvalidRequestError(f"{name} is {value}, but must be {limit}", name)


def _require_int(name: str, value: int, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be a whole number, not {value!r}", name)
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} is {value}, but must be {limit}", name)
