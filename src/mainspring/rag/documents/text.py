"""Plain text, and the two markup languages whose source is itself readable: Markdown and reStructuredText.

Their text is kept as it is, so that a place is a line of the file; only their headings are read.
"""

from __future__ import annotations

import re
from pathlib import Path

from mainspring.rag.documents.decoding import decode
from mainspring.rag.documents.document import Extract

_ATX = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_SETEXT = re.compile(r"^ {0,3}(=+|-+)[ \t]*$")
_ADORNMENT = re.compile(r"^([!-/:-@\[-`{-~])\1{2,}[ \t]*$")


def read_text(path: Path, data: bytes) -> Extract:
    """Plain text: no headings."""
    return Extract(decode(path, data))


def read_markdown(path: Path, data: bytes) -> Extract:
    """CommonMark: ATX (#) and setext (underlined) headings outside fenced code and front matter."""
    text = decode(path, data)
    headings: list[tuple[int, int, str]] = []
    fence = ""
    previous, previous_offset = "", 0
    offset = _front_matter(text)
    for line in text[offset:].splitlines(keepends=True):
        bare = line.rstrip("\n")
        opened = _FENCE.match(bare)
        if opened and (not fence or opened[1].startswith(fence)):
            fence = "" if fence else opened[1]
        elif not fence:
            atx = _ATX.match(bare)
            setext = _SETEXT.match(bare)
            if atx:
                headings.append((offset, len(atx[1]), atx[2]))
            elif (
                setext
                and previous.strip()
                and not _ATX.match(previous)
                and not previous.startswith((" ", ">", "-"))
            ):
                headings.append((previous_offset, 1 if setext[1][0] == "=" else 2, previous.strip()))
        previous, previous_offset = bare, offset
        offset += len(line)
    return Extract(text, headings)


def _front_matter(text: str) -> int:
    """Length of a YAML block at the very start."""
    found = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    return found.end() if found else 0


def read_restructured_text(path: Path, data: bytes) -> Extract:
    """Section titles as docutils finds them: text underlined (and perhaps overlined) by punctuation as wide as it.

    Levels follow the order in which the styles first appear.
    """
    text = decode(path, data)
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    styles: list[tuple[str, bool]] = []
    headings: list[tuple[int, int, str]] = []
    for i in range(1, len(lines)):
        title, under = lines[i - 1], _ADORNMENT.match(lines[i])
        if (
            not under
            or not title.strip()
            or _ADORNMENT.match(title)
            or len(lines[i].rstrip()) < len(title.rstrip())
        ):
            continue
        over = i > 1 and lines[i - 2].rstrip() == lines[i].rstrip()
        if not over and (title.startswith((" ", "..")) or (i > 1 and lines[i - 2].strip())):
            continue  # indented text, a directive, or the last line of a paragraph
        style = (under[1], over)
        if style not in styles:
            styles.append(style)
        headings.append((starts[i - 2] if over else starts[i - 1], styles.index(style) + 1, title.strip()))
    return Extract(text, headings)
