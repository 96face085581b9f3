"""Cutting a stretch of text into pieces of at most so many tokens: at token borders, or at ends of sentences."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from mainspring.errors import ConfigError
from mainspring.rag.chunking.sentences import sentence_spans

Span = tuple[int, int]


def check_sizes(size: int, overlap: int) -> None:
    """Raises ConfigError for sizes that make no sense."""
    if size < 8:
        raise ConfigError(f"a chunk needs at least 8 tokens, got size {size}")
    if not 0 <= overlap < size:
        raise ConfigError(f"overlap {overlap} must be at least 0 and below the size {size}")


class TokenMap:
    """The tokens of a whole text, found once: (start, end) in characters of each, in order."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._starts = [start for start, _ in spans]

    def between(self, start: int, end: int) -> Sequence[Span]:
        """The tokens that begin in [start, end)."""
        return self._spans[bisect.bisect_left(self._starts, start) : bisect.bisect_left(self._starts, end)]


def token_windows(
    text: str, start: int, end: int, size: int, overlap: int, tokens_of: TokenMap
) -> list[Span]:
    """Pieces of `size` tokens, each beginning `overlap` tokens before the last one's end. All tokens are covered."""
    tokens = tokens_of.between(start, end)
    spans: list[Span] = []
    for first in range(0, len(tokens), size - overlap):
        last = min(first + size, len(tokens))
        spans.append((tokens[first][0], tokens[last - 1][1]))
        if last == len(tokens):
            break
    return spans


def sentence_windows(
    text: str, start: int, end: int, size: int, overlap: int, tokens_of: TokenMap
) -> list[Span]:
    """Pieces of whole sentences with at most `size` tokens; the next one repeats last sentences of up to `overlap`.

    A sentence longer than `size` is cut at token borders.
    """
    units: list[tuple[Span, int]] = []  # (span, tokens)
    for span in sentence_spans(text, start, end):
        units.extend(((p[0][0], p[-1][1]), len(p)) for p in _parts(tokens_of.between(*span), size))
    spans: list[Span] = []
    first = 0
    while first < len(units):
        last, total = first, 0
        while last < len(units) and total + units[last][1] <= size:
            total += units[last][1]
            last += 1
        spans.append((units[first][0][0], units[last - 1][0][1]))
        if last == len(units):
            break
        first = _back(units, first, last, overlap)
    return spans


def _back(units: Sequence[tuple[Span, int]], first: int, last: int, overlap: int) -> int:
    """The first unit of the next piece: as many of the last ones as fit `overlap`, and progress in any case."""
    begin, repeated = last, 0
    while begin - 1 > first and repeated + units[begin - 1][1] <= overlap:
        begin -= 1
        repeated += units[begin][1]
    return begin


def _parts(tokens: Sequence[Span], size: int) -> list[Sequence[Span]]:
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]
