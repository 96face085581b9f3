"""In which order the generator reads the passages (arXiv 2407.01219, section 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

T = TypeVar("T")


def repack(passages: Sequence[T], order: Literal["forward", "reverse", "sides"]) -> list[T]:
    """Passages come best first. "forward" keeps that, "reverse" puts the best last, next to the question.

    "sides" puts the best at both ends and the worst into the middle, where models read worst (arXiv 2307.03172): of
    1 2 3 4 5 it makes 1 3 5 4 2.
    """
    if order == "forward":
        return list(passages)
    if order == "reverse":
        return list(reversed(passages))
    return [*passages[::2], *reversed(passages[1::2])]
