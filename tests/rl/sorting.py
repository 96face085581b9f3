"""A task that a tiny model learns in seconds: digits, then the same digits in order."""

from __future__ import annotations

import random

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import Numerics
from mainspring.rl.samples import Pair, Sample
from train.models import tiny_config

SEPARATOR, END = 10, 11


def config() -> ModelConfig:
    return tiny_config(
        vocab_size=12, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )


def model(numerics: Numerics = "fast", seed: int = 0) -> Decoder:
    return create_model(config(), numerics=numerics, seed=seed)


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
