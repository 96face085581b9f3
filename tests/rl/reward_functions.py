"""Reward functions and an environment that misbehave on demand, for a worker to import."""

from __future__ import annotations

import os
import time

from mainspring.rl.environment import Turn
from mainspring.rl.prompts import Prompt


def moody(prompt: str, answer: str, reference: str) -> float:
    if answer == "raise":
        raise ValueError("no such thing")
    if answer == "hang":
        time.sleep(3600)
    if answer == "die":
        os._exit(3)
    if answer == "nan":
        return float("nan")
    return float(answer == reference)


def share_of_digits(prompt: str, answer: str, reference: str) -> float:
    """What a model of random bytes has some of."""
    return sum(character.isdigit() for character in answer) / max(len(answer), 1)


def often_raises(prompt: str, answer: str, reference: str) -> float:
    if sum(map(ord, answer)) % 3 == 0:
        raise ValueError("not this one")
    return share_of_digits(prompt, answer, reference)


class MoodyWorld:
    """Says what it has been told so far."""

    def reset(self, prompt: Prompt) -> None:
        if prompt.text == "hang":
            time.sleep(3600)
        self._heard = prompt.text

    def step(self, answer: str) -> Turn:
        if answer == "nothing":
            return None  # as a careless one might
        if answer == "raise":
            raise ValueError("no such turn")
        if answer in ("hang", "die"):
            moody("", answer, "")
        self._heard += f">{answer}"
        return Turn(self._heard, reward=0.5)
