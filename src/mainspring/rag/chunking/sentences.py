"""Where sentences end: rules over punctuation, abbreviations and blank lines; no model and no data file."""

from __future__ import annotations

import itertools
import re

# Full stops that end no sentence: before these, and after single capital letters (initials).
_ABBREVIATIONS = {
    "mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "etc", "eg", "e.g", "ie", "i.e", "cf", "fig", "figs",
    "eq", "eqs", "no", "nos", "vol", "pp", "al", "inc", "ltd", "co", "corp", "dept", "approx", "jan", "feb", "mar",
    "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "u.s", "u.k", "a.m", "p.m", "gen", "col", "lt",
}  # fmt: skip
_ENDS = re.compile(
    r"""(?<=[.!?…])["'”’)\]]*\s+(?=["'“‘(\[]*[^\s a-z])"""  # a full stop, white space, no small letter
    r"""|(?<=[。！？])"""
    r"""|\n\s*\n"""  # a blank line
    r"""|^\#{1,6}[ ].*\n|\n(?=\#{1,6}[ ])"""  # a heading of Markdown
    r"""|\n(?=\s*(?:[-*+•]|\d+[.)])\s)""",  # an item of a list
    re.MULTILINE,
)


def sentence_spans(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """(start, end) of each sentence of text[start:end], without the white space around it, in order.

    Blank lines and list items end sentences as well. A text without any such end is one sentence.
    """
    end = len(text) if end is None else end
    cuts = [start]
    for found in _ENDS.finditer(text, start, end):
        closed = found[0][:1] in (
            '"',
            "'",
            "”",
            "’",
            ")",
            "]",
        )  # a full stop inside of these ends its sentence
        if closed or "\n" in found[0] or not _is_abbreviation(text, cuts[-1], found.start()):
            cuts.append(found.end())
    cuts.append(end)
    spans = []
    for first, last in itertools.pairwise(cuts):
        piece = text[first:last]
        stripped = piece.strip()
        if stripped:
            begin = first + len(piece) - len(piece.lstrip())
            spans.append((begin, begin + len(stripped)))
    return spans


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [text[first:last] for first, last in sentence_spans(text)]


def _is_abbreviation(text: str, start: int, end: int) -> bool:
    """Whether text[start:end], which a possible end of a sentence follows, ends in an abbreviation's full stop."""
    word = text[max(start, end - 20) : end].rstrip("\"'”’)]").rsplit(None, 1)
    last = word[-1].lstrip("(\"'“‘[") if word else ""
    if not last.endswith("."):
        return False
    stem = last[:-1].lower()
    return stem in _ABBREVIATIONS or (len(stem) == 1 and last[0].isupper())
