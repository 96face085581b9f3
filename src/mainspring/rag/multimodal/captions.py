"""Pictures of a folder with the captions that its documents give them: HTML, Markdown, reStructuredText.

A picture that no document shows is captioned by the words of its file's name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup
from bs4.element import Tag

from mainspring.errors import DocumentError
from mainspring.rag.documents.decoding import decode
from mainspring.rag.documents.reading import read_bytes, walk
from mainspring.rag.multimodal.pictures import SUFFIXES

_MARKDOWN = re.compile(r"!\[([^\]]*)\]\(\s*(?:<([^>]+)>|([^)\s<]+))(?:\s+[\"']([^\"']*)[\"'])?\s*\)")
_RST = re.compile(
    r"^([ \t]*)\.\.[ ]+(?:\|[^|]+\|[ ]+)?(?:figure|image)::[ ]*(\S+)[ \t]*\n((?:\1[ \t]+\S.*\n|[ \t]*\n)*)",
    re.M,
)
_DOCUMENTS = {".html", ".htm", ".xhtml", ".md", ".markdown", ".rst"}


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture file, its caption, and the document and line that show it (the file itself and 1 if none does)."""

    file: str
    caption: str
    page: str
    line: int


def find_captioned(folder: Path) -> tuple[list[CaptionedPicture], list[tuple[str, str]]]:
    """(every picture file below a folder with its first caption, (document, reason) of what could not be read).

    Names are relative to the folder, with forward slashes. Raises DocumentError if there is no such folder.
    """
    if not folder.is_dir():
        raise DocumentError(f"there is no folder {folder}")
    pictures = {file.name for file in walk(folder, SUFFIXES)}
    documents = sorted(walk(folder, _DOCUMENTS), key=lambda file: file.name) if pictures else []
    found: dict[str, CaptionedPicture] = {}
    failures: list[tuple[str, str]] = []
    for document in documents:
        name = document.name
        try:
            text = decode(document.path, read_bytes(document))
        except DocumentError as error:
            failures.append((name, str(error)))
            continue
        for target, caption, line in _shown(document.path.suffix.lower(), text):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(target)))
            if file in pictures and file not in found and caption:
                found[file] = CaptionedPicture(file, caption, name, line)
    for file in pictures - set(found):
        found[file] = CaptionedPicture(file, _words(Path(file).stem), file, 1)
    return [found[file] for file in sorted(found)], failures


def _shown(suffix: str, text: str) -> Iterator[tuple[str, str, int]]:
    """(the picture's address, its caption, the line) of every picture that a document shows."""
    if suffix in (".md", ".markdown"):
        for match in _MARKDOWN.finditer(text):
            yield match[2] or match[3], _plain(match[4] or match[1]), text.count("\n", 0, match.start()) + 1
    elif suffix == ".rst":
        for match in _RST.finditer(text):
            yield match[2], _rst_caption(match[3]), text.count("\n", 0, match.start()) + 1
    elif "<img" in text.lower():  # to parse every page that shows nothing would take most of the time
        soup = BeautifulSoup(text, "html.parser")
        for image in soup.find_all("img"):
            if isinstance(image, Tag):
                yield str(image.get("src", "")), _html_caption(image), image.sourceline or 1


def _html_caption(image: Tag) -> str:
    """The figure's caption; without one the figure's title and the alternative text."""
    figure = image.find_parent("figure") or image.find_parent("div", class_=re.compile(r"figure"))
    parts: list[str] = []
    if figure is not None:
        heads = figure.find_all(["figcaption"]) or figure.find_all("p", class_="title")
        parts += [head.get_text(" ", strip=True) for head in heads[:1]]
        box = image.find_parent("div", class_="mediaobject")
        own = box.find("div", class_="caption") if box is not None else None
        parts += [own.get_text(" ", strip=True)] if own is not None else []
    if not parts:
        parts = [str(image.get("alt") or image.get("title") or "")]
    return _plain(". ".join(part.rstrip(". ") for part in parts if part))


def _rst_caption(block: str) -> str:
    """The first paragraph under a figure's options; without one its :alt:."""
    lines = [line.strip() for line in block.splitlines()]
    options = [line for line in lines if line.startswith(":")]
    paragraph: list[str] = []
    for line in lines:
        if line.startswith(":"):
            continue
        if not line and paragraph:
            break
        if line:
            paragraph.append(line)
    alternatives = [line.partition(":alt:")[2] for line in options if line.startswith(":alt:")]
    return _plain(" ".join(paragraph) or " ".join(alternatives))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _words(stem: str) -> str:
    return _plain(re.sub(r"[_\-.\d]+", " ", stem)) or stem
