"""How one request is to be sampled: names and defaults as in vLLM. Needs no PyTorch, travels as msgpack."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mainspring.errors import InvalidRequestError

MAX_N = 128  # completions of one prompt
MAX_BIAS = 100.0
# Beyond these the logits would leave float32 and every token be as good as any other.
MAX_TEMPERATURE = 1e6
REPETITION_PENALTIES = (0.01, 100.0)


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of a completion must be: exactly one of the fields is given. Names as in vLLM.

    Whether a schema, an expression or a grammar can be followed is found out by the engine, which has the grammar
    engine and the vocabulary; here only the form is checked.

    Attributes:
        json: a JSON schema, as an object or as the text of one.
        regex: a regular expression that the whole text matches.
        choice: the text is one of these.
        grammar: a context-free grammar in EBNF (GBNF, `root ::= ...`) or in Lark's notation (`start: ...`).
        json_object: any JSON object.

    Raises:
        InvalidRequestError: none or several are given, or one of the wrong form.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            raise _structured("json_object is false; leave it out instead")
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise _structured(
                f"must have exactly one of {', '.join(self.__struct_fields__)}, not {given or 'none'}"
            )
        for name, kinds in (("json", (str, Mapping)), ("regex", (str,)), ("grammar", (str,))):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or value == ""):
                raise _structured(f"{name} must be a non-empty string{' or an object' * (name == 'json')}")
        if self.json is not None:
            self._check_schema(self.json)
        if self.choice is not None:
            choices = () if isinstance(self.choice, str) else self.choice
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise _structured(f"choice must be a list of non-empty strings, not {self.choice!r}")

    @staticmethod
    def _check_schema(schema: Mapping[str, Any] | str) -> None:
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise _structured(f"json is not a JSON schema: {error}") from error
        if not isinstance(value, (Mapping, bool)):
            raise _structured(f"json must hold a schema (an object), not {schema!r}")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Validated on construction, also when decoded from a message.

    The logits of a token pass, in this order: `allowed_token_ids`, `structured_outputs`, `min_tokens` and
    `bad_words` (which forbid tokens), `logit_bias`, the penalties, the temperature, `min_p`, `top_k`, `top_p`.

    Attributes:
        n: completions of the prompt. Completion i is drawn with a key of its own, made of the seed and i.
        presence_penalty: taken off the logit of every token that the completion has already, in [-2, 2].
        frequency_penalty: the same for every time that it has it.
        repetition_penalty: divides the positive logits (and multiplies the negative ones) of the tokens of prompt
            and completion, in [0.01, 100]; 1 does nothing (Keskar et al. 2019, "CTRL", section 4.1).
        temperature: divides the logits, at most a million; 0 means greedy.
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
        logit_bias: added to the logits of these tokens, in [-100, 100].
        allowed_token_ids: no other token is generated.
        bad_words: texts whose tokens are not generated one after the other, at the start of a word or within one.
        structured_outputs: what the text must be; see `StructuredOutputsParams`.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or the stop token's text) at the end of the text.

    Raises:
        InvalidRequestError: a value is of the wrong type or out of range; `param` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
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
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _require_int("n", self.n, low=1, high=MAX_N)
        _require_number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _require_number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        low, high = REPETITION_PENALTIES
        _require_number("repetition_penalty", self.repetition_penalty, low=low, high=high)
        _require_number("temperature", self.temperature, low=0.0, high=MAX_TEMPERATURE)
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
        self._check_tokens()

    def _check_tokens(self) -> None:
        """The fields that name tokens: their form. Whether the vocabulary has them is the engine's to check."""
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidRequestError(
                    f"logit_bias must be an object of token ids and numbers, not {self.logit_bias!r}",
                    "logit_bias",
                )
            for token_id, bias in self.logit_bias.items():
                _require_int("logit_bias", token_id, low=0)
                _require_number("logit_bias", bias, low=-MAX_BIAS, high=MAX_BIAS)
        if self.allowed_token_ids is not None:
            if not isinstance(self.allowed_token_ids, Sequence) or not self.allowed_token_ids:
                raise InvalidRequestError(
                    f"allowed_token_ids must be a list of at least one token id, not {self.allowed_token_ids!r}",
                    "allowed_token_ids",
                )
            for token_id in self.allowed_token_ids:
                _require_int("allowed_token_ids", token_id, low=0)
        if self.bad_words is not None:
            words = None if isinstance(self.bad_words, str) else self.bad_words
            if not isinstance(words, Sequence) or not all(isinstance(word, str) and word for word in words):
                raise InvalidRequestError(
                    f"bad_words must be a list of non-empty strings, not {self.bad_words!r}", "bad_words"
                )
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputsParams
        ):
            raise InvalidRequestError(
                f"structured_outputs must be a StructuredOutputsParams, not {self.structured_outputs!r}",
                "structured_outputs",
            )

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
    def penalised(self) -> bool:
        """A penalty is in force: the logits depend on the tokens that are there already."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

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


def _structured(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs: {problem}", "structured_outputs")


def _require_number(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name} must be a number, not {value!r}", name)
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise InvalidRequestError(f"{name} is {value}, but must be {limit}", name)


def _require_int(name: str, value: int, *, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be a whole number, not {value!r}", name)
    if not low <= value <= high:
        limit = f"at least {low}" if value < low and high == 2**31 - 1 else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} is {value}, but must be {limit}", name)
