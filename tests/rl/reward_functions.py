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
