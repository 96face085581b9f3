"""What a policy is asked, and how its tokens become text and text its tokens. No PyTorch: reward workers import it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


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


def epoch_order(epoch: int, count: int, seed: int) -> list[int]:
    """In which order an epoch takes the prompts: all of them once, a function of seed and epoch."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order: list[int] = random.permutation(count).tolist()
    return order
