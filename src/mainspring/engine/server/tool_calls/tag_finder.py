"""Finds a tag in a text that comes character by character."""

from __future__ import annotations


class TagFinder:
    """Holds back what may be the beginning of `tag`.

    `push` returns the text that is certainly no part of it; `found` is then true if the tag is complete.
    """

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.held = ""
        self.found = False

    def push(self, character: str) -> str:
        """Takes one character; returns what is released."""
        self.held += character
        if self.held == self.tag:
            self.held = ""
            self.found = True
            return ""
        self.found = False
        # The longest end of what is held that may still become the tag stays.
        keep = len(self.held)
        while keep and not self.tag.startswith(self.held[-keep:]):
            keep -= 1
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return released

    def flush(self) -> str:
        """What is still held when the text ends."""
        rest, self.held = self.held, ""
        return rest
