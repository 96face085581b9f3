"""A task that a tiny model learns in seconds: digits, then the same digits in order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import Numerics
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rewards import Completion
from mainspring.rl.samples import Pair, Sample
from train.models import tiny_config

SEPARATOR, END = 10, 11
_CHARACTERS = "0123456789>."


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 12,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return tiny_config(**(sizes | changes))


def model(numerics: Numerics = "fast", seed: int = 0, **changes: Any) -> Decoder:
    return create_model(config(**changes), numerics=numerics, seed=seed)


def pairs(count: int, seed: int) -> list[Pair]:
    """Of 3 to 5 digits: in order is preferred to out of order."""
    draw = random.Random(seed)
    result: list[Pair] = []
    while len(result) < count:
        digits = [draw.randrange(10) for _ in range(draw.randint(3, 5))]
        ordered, other = sorted(digits), draw.sample(digits, len(digits))
        if other != ordered:
            prompt = [*digits, SEPARATOR]
            result.append(Pair(Sample.answer(prompt, [*ordered, END]), Sample.answer(prompt, [*other, END])))
    return result


def prompts(count: int, seed: int, *, least: int = 3, most: int = 5) -> list[Prompt]:
    """Digits and the separator; the reference is the digits in order."""
    draw = random.Random(seed)
    result = []
    for _ in range(count):
        digits = [draw.randrange(10) for _ in range(draw.randint(least, most))]
        text = "".join(map(str, digits)) + ">"
        result.append(Prompt(tuple(encode(text)), text, "".join(map(str, sorted(digits)))))
    return result


def encode(text: str) -> list[int]:
    return [_CHARACTERS.index(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(_CHARACTERS[token] for token in tokens if token != END)


TEXTS = Texts(encode, decode, (END,))


class Sorted:
    """A scorer in the same process: whether the answer is the reference."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(c.answer == c.reference) for c in completions]


class Graded:
    """The share of places that are right, so that groups of a model that knows nothing differ too."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [
            sum(a == b for a, b in zip(c.answer, c.reference, strict=False))
            / max(len(c.answer), len(c.reference))
            for c in completions
        ]
