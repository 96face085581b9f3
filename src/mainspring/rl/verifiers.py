"""Rewards by rule: whether an answer states what is known to be right. No PyTorch here: they run in a worker.

Each takes (prompt, answer, reference) and gives 1.0 or 0.0.
"""

from __future__ import annotations

import re
from fractions import Fraction

# A minus between two terms is no sign: "10-3" states 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)")
_MOST_CHARACTERS = 1000  # of a number; a longer run of digits is a model that repeats itself
_MARKER = re.compile(r"####\s*([^\n]*)")
_BOXED = "\\boxed{"


def exact_match(prompt: str, answer: str, reference: str) -> float:
    """Whether the answer is the reference, up to white space."""
    return float(answer.split() == reference.split())


def same_number(prompt: str, answer: str, reference: str) -> float:
    """Whether both state the same number, exactly: "1,000.0" is "1000". An answer or reference without one: 0."""
    stated, right = stated_number(answer), stated_number(reference)
    return float(stated is not None and stated == right)


def stated_number(text: str) -> Fraction | None:
    """The number that a text gives as its result.

    Of the last \\boxed{...}, else of the last line after "####" (as GSM8K's solutions end), else the text's last
    one. Thousands may have commas. None where there is no number, or one of over a thousand characters.
    """
    boxed = _last_boxed(text)
    if boxed is None and (marked := _MARKER.findall(text)):
        boxed = marked[-1]
    found = _NUMBER.findall(text if boxed is None else boxed)
    if not found or len(found[-1]) > _MOST_CHARACTERS:
        return None
    return Fraction(found[-1].replace(",", "").replace("−", "-"))


def _last_boxed(text: str) -> str | None:
    """What stands within the braces, which may hold further braces."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, first = 1, start + len(_BOXED)
    for i in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[first:i]
    return None
