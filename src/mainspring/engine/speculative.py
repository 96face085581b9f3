"""Speculative decoding: tokens are guessed, and a step verifies several at once.

Sampling is a function of the logits, the request's key and the position (`ops.sample`). So a guess is verified by
drawing the model's own token at each guessed position and comparing: the tokens up to and with the first that differs
from its guess are exactly those that would have been drawn one by one, whatever the guesses were. Greedy or not, the
text is that without speculation, and in lockstep so are the log-probabilities, to the bit. (Leviathan, Kalman and
Matias 2023, "Fast inference from transformers via speculative decoding", keep the distribution only, and need the
drafter's probabilities for it.)

Requests with penalties, bad words or a grammar are not drafted for: what their next token may be depends on the ones
before it, which are guesses then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError

Method = Literal["ngram", "draft_model"]

MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed; names as in vLLM.

    Attributes:
        num_speculative_tokens: most tokens that are guessed at once.
        method: "ngram" looks up how the text went on after the same tokens before (prompt lookup); "draft_model" lets
            a small model of the same vocabulary continue.
        prompt_lookup_max, prompt_lookup_min: most and fewest tokens of the end of the text that "ngram" looks up.
        model: directory, GGUF file or name of the draft model.

    Raises:
        ConfigError: a value is out of range, or the draft model is not named.
    """

    num_speculative_tokens: int = 4
    method: Method = "ngram"
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    model: str | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(
                f"speculative method is {self.method!r}, but must be one of {', '.join(get_args(Method))}"
            )
        for name, highest in (
            ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS),
            ("prompt_lookup_max", 64),
            ("prompt_lookup_min", 64),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
                raise ConfigError(f"{name} is {value!r}, but must be a whole number from 1 to {highest}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, above prompt_lookup_max, which is "
                f"{self.prompt_lookup_max}"
            )
        if self.method == "ngram" and self.model is not None:
            raise ConfigError(
                f"a draft model ({self.model}) was given, but the method is 'ngram'; say method='draft_model'"
            )


def may_draft(params: SamplingParams) -> bool:
    """Whether guesses are made for such a request (one with a grammar of its own is excluded by the scheduler)."""
    has_rules = params.structured_outputs is not None or bool(params.bad_words)
    return not params.penalised and not has_rules
