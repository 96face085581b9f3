"""Guesses from the text itself: how it went on when its last tokens stood there before (Saxena 2023, "Prompt lookup
decoding"). It costs nothing, and hits where a text repeats its prompt: code edits, extraction, retrieved documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mainspring.engine.request import Request


@dataclass(slots=True)
class _Index:
    """Where the latest run of n tokens that has a continuation ends, by the run, of one request.

    Attributes:
        ends: for each n of the drafter, {run: position of the token after it}.
        num_indexed: runs that end before this position are in.
    """

    request: Request
    ends: list[dict[tuple[int, ...], int]]
    num_indexed: int = field(default=0)


class NgramDrafter:
    """Implements `hooks.Drafter`. Each token is indexed once, so a proposal takes O(1)."""

    def __init__(self, num_tokens: int, longest: int, shortest: int) -> None:
        """Looks up the last `longest` to `shortest` tokens, the longest run first; proposes num_tokens tokens."""
        self._num_tokens = num_tokens
        self._lengths = list(range(longest, shortest - 1, -1))
        self._indices: dict[str, _Index] = {}

    def propose(self, requests: Sequence[Request]) -> None:
        """See `hooks.Drafter.propose`."""
        for request_id in [key for key, index in self._indices.items() if index.request.is_finished]:
            del self._indices[request_id]
        for request in requests:
            request.draft_token_ids = self._continue(request)

    def free_cache(self) -> None:
        """See `hooks.Drafter.free_cache`: there is none on a device."""

    def _continue(self, request: Request) -> list[int]:
        tokens = request.token_ids
        count = min(self._num_tokens, request.max_drafts())
        if count < 1:
            return []
        index = self._indices.get(request.request_id)
        if index is None or index.request is not request:
            index = self._indices[request.request_id] = _Index(request, [{} for _ in self._lengths])
        for length, ends in zip(self._lengths, index.ends, strict=True):
            # The run at the end of the text has no continuation yet: it is indexed when the next token is there.
            for end in range(max(index.num_indexed, length), len(tokens)):
                ends[tuple(tokens[end - length : end])] = end
        index.num_indexed = max(index.num_indexed, len(tokens))
        for length, ends in zip(self._lengths, index.ends, strict=True):
            found = ends.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if found is not None:
                period = len(tokens) - found
                # Past the end of the text the guess goes on by repeating itself.
                return [tokens[found + i % period] for i in range(count)]
        return []
