"""Prompts that ask for the text between a prefix and a suffix, for models that were taught to fill it in.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", section 3: the order is
prefix, suffix, middle, each behind its own special token.
"""

from __future__ import annotations

from dataclasses import dataclass

from mainspring.errors import InvalidRequestError
from mainspring.formats.tokenizer import Tokenizer

# Before the prefix, before the suffix, before the middle.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)


@dataclass(frozen=True, slots=True)
class FillInMiddle:
    """The ids of a model's three marks."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FillInMiddle:
        """The marks that this tokenizer has. Raises: InvalidRequestError, if it has none."""
        for marks in _MARKS:
            ids = [tokenizer.token_to_id(mark) for mark in marks]
            known = [token_id for token_id in ids if token_id is not None]
            if len(known) == len(marks):
                return cls(*known)
        raise InvalidRequestError(
            "suffix needs a model with fill-in-the-middle tokens, and this one has none; leave suffix out",
            "suffix",
        )

    def prompt(self, before: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
        """The prompt; `before` is what the tokenizer puts before every text, such as a first bos."""
        return [*before, self.prefix, *prefix, self.suffix, *suffix, self.middle]

    @property
    def stop_token_ids(self) -> list[int]:
        """The middle ends where the model begins another part."""
        return [self.prefix, self.suffix, self.middle]
