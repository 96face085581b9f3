"""Finds a tag in a text that comes character by character."""

from __future__ import annotations


class TagFinder:
    """Holds back what may be the beginning of one of `tags`, none of which begins with another.

    `push` returns the text that is certainly no part of one; `found` is then true if a tag is complete, and `which`
    says it.
    """

    def __init__(self, *tags: str) -> None:
        self.tags = tags
        self.held = ""
        self.found = False
        self.which = ""

    def push(self, character: str) -> str:
        """Takes one character; returns what is released."""
        self.held += character
        # The longest end of what is held that may still become a tag stays.
        keep = len(self.held)
        while keep and not any(tag.startswith(self.held[-keep:]) for tag in self.tags):
            keep -= 1
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.found = self.held in self.tags
        if self.found:
            self.which, self.held = self.held, ""
        return released

    def flush(self) -> str:
        """What is still held when the text ends."""
        rest, self.held = self.held, ""
        return rest
