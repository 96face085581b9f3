"""What the server tells its user while it starts and ends; the command line shows it."""

from __future__ import annotations

from typing import Protocol

from mainspring.engine.server.protocol import Ready


class Reporter(Protocol):
    """Shows the user what the server does."""

    def step(self, message: str) -> None:
        """A new step of the start has begun."""

    def progress(self, done: int, total: int) -> None:
        """The present step is that far."""

    def ready(self, url: str, model_name: str, ready: Ready, chats: bool) -> None:
        """Requests are taken at this address; `chats`: the model has a chat template."""

    def note(self, message: str) -> None:
        """Something happened after the start."""
