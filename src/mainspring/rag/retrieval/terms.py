"""Words of a text as a lexical index sees them: lower case, stop words left out, English stems."""

from __future__ import annotations

import re
from functools import lru_cache

import snowballstemmer

_WORD = re.compile(r"\w+")
# Words that carry no topic; "who", "when" and their like ask and are no content either.
_STOP_TEXT = """
a an and are as at be been but by did do does for from had has have he her him his how i if in into is it its me my no
not of on or our she so such than that the their them then there these they this those to was we were what when where
which who whom whose why will with would you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())


def terms(text: str) -> list[str]:
    """The stems of the words that carry meaning, in order (Snowball's English stemmer, Porter 2)."""
    return [_stem(word) for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    # A stemmer keeps the word it works on, so that threads must not share one.
    return str(snowballstemmer.stemmer("english").stemWord(word)) if word.isalpha() else word
