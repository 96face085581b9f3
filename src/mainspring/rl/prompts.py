"""What a policy is asked, and how its tokens become text and text its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mainspring.errors import ConfigError
from mainspring.rl.sample_files import read_rows


@dataclass(frozen=True)
class Prompt:
    """A question as the policy reads it, and what its answer is held against."""

    tokens: tuple[int, ...]
    text: str
    reference: str


@dataclass(frozen=True)
class Texts:
    """Between tokens and texts. An answer's tokens are never encoded anew: what was sampled is what is learnt from."""

    encode: Callable[[str], Sequence[int]]
    """Without special tokens of its own; those that the text spells out are kept."""
    decode: Callable[[Sequence[int]], str]
    """Without special tokens."""
    ends: tuple[int, ...]
    """Tokens that end an answer (a turn, where there is an environment)."""


class _PromptRow(msgspec.Struct):
    prompt: str
    reference: str = ""


def read_prompts(path: str | Path, encode: Callable[[str], Sequence[int]]) -> list[Prompt]:
    """Of lines {"prompt": "...", "reference": "..."}; other keys and empty lines are passed over.

    encode: a prompt's text -> all tokens that stand before the answer, a chat template's included. Raises ConfigError
    naming the first bad line and how many there are, or if the file cannot be read or holds none.
    """

    def prompt(row: _PromptRow) -> Prompt:
        tokens = tuple(encode(row.prompt))
        if not tokens:
            raise ConfigError("the prompt is empty")
        return Prompt(tokens, row.prompt, row.reference)

    return read_rows(path, _PromptRow, prompt)


def epoch_order(epoch: int, count: int, seed: int) -> list[int]:
    """In which order an epoch takes the prompts: all of them once, a function of seed and epoch."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order: list[int] = random.permutation(count).tolist()
    return order
