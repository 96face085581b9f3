"""Reward functions that misbehave on demand, for a worker to import."""

from __future__ import annotations

import os
import time


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
