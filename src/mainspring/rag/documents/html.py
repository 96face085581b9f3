"""HTML as text: blocks on lines of their own, scripts and navigation left out, places as lines of the source."""

from __future__ import annotations

import re
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.element import Comment, Doctype, NavigableString, PageElement, Tag

from mainspring.rag.documents.decoding import decode
from mainspring.rag.documents.document import Extract, Mark, Place

_LEFT_OUT = {"script", "style", "noscript", "template", "nav", "svg", "head", "iframe"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "figcaption", "figure", "footer",
    "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section", "table",
    "td", "th", "tr", "ul",
}  # fmt: skip
_HEADING = re.compile(r"h([1-6])")


class _Text:
    """Collects text with its marks and headings; white space between words collapses, blocks begin new lines."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.marks: list[Mark] = []
        self.headings: list[tuple[int, int, str]] = []

    def add(self, text: str, line: int | None) -> None:
        if self.length == 0 or self.pieces[-1].endswith(("\n", " ")):
            text = text.lstrip(" ")
        if not text:
            return
        if line is not None and (not self.marks or self.marks[-1].place.number != line):
            self.marks.append(Mark(self.length, Place("line", line)))
        self.pieces.append(text)
        self.length += len(text)

    def new_line(self) -> None:
        if self.pieces and not self.pieces[-1].endswith("\n"):
            self.pieces.append("\n")
            self.length += 1


def read_html(path: Path, data: bytes) -> Extract:
    """The visible text of a page; its <title>, and h1 to h6 as headings."""
    soup = BeautifulSoup(decode(path, data), "html.parser")
    text = _Text()
    _walk(soup, text, None, False)
    title = soup.title.get_text(" ", strip=True) if soup.title is not None else None
    return Extract("".join(text.pieces), text.headings, text.marks, title or None)


def _walk(root: Tag, text: _Text, line: int | None, verbatim: bool) -> None:
    """An explicit stack: pages nest deeper than Python's calls do."""
    stack: list[tuple[PageElement | None, int | None, bool]] = [(root, line, verbatim)]
    while stack:
        node, line, verbatim = stack.pop()
        if node is None:
            text.new_line()
        elif isinstance(node, NavigableString):
            if not isinstance(node, Comment | Doctype):
                text.add(str(node) if verbatim else re.sub(r"\s+", " ", str(node)), line)
        elif isinstance(node, Tag) and node.name not in _LEFT_OUT:
            line = node.sourceline if node.sourceline is not None else line
            block = node.name in _BLOCKS
            if block:
                text.new_line()
                stack.append((None, line, False))
            heading = _HEADING.fullmatch(node.name)
            if heading:
                text.headings.append((text.length, int(heading[1]), node.get_text(" ", strip=True)))
            verbatim = verbatim or node.name == "pre"
            stack.extend((child, line, verbatim) for child in reversed(node.contents))
