"""Word documents as text: paragraphs and tables in order, places as paragraphs."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import docx
from docx.opc.exceptions import PackageNotFoundError
from docx.table import Table
from docx.text.paragraph import Paragraph

from mainspring.errors import DocumentError
from mainspring.rag.documents.document import Extract, Mark, Place

_MAX_UNPACKED = 512 << 20  # bytes: a small archive may unpack to anything


def read_docx(path: Path, data: bytes) -> Extract:
    """The text of a .docx. Raises DocumentError if it is corrupt, or unpacks to more than 512 MiB."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > _MAX_UNPACKED:
            raise DocumentError(f"{path} unpacks to {unpacked} bytes; at most {_MAX_UNPACKED} are read")
        word = docx.Document(io.BytesIO(data))
    except (zipfile.BadZipFile, PackageNotFoundError, KeyError, ValueError) as error:
        raise DocumentError(f"{path} is not a Word document ({error}): repair or remove it") from error
    pieces: list[str] = []
    marks: list[Mark] = []
    headings: list[tuple[int, int, str]] = []
    length = 0
    for number, (text, style) in enumerate(_blocks(word), 1):
        if not text.strip():
            continue
        marks.append(Mark(length, Place("paragraph", number)))
        level = re.fullmatch(r"Heading (\d)|Title", style)
        if level:
            headings.append((length, int(level[1]) if level[1] else 1, text.strip()))
        pieces.append(text + "\n\n")
        length += len(text) + 2
    return Extract("".join(pieces), headings, marks, word.core_properties.title or None)


def _blocks(word: docx.document.Document) -> Iterator[tuple[str, str]]:
    """(text, name of the style) of each paragraph and table; a table's cells are joined by bars."""
    for item in word.iter_inner_content():
        if isinstance(item, Paragraph):
            yield item.text, (item.style.name or "") if item.style is not None else ""
        elif isinstance(item, Table):
            yield "\n".join(" | ".join(cell.text.strip() for cell in row.cells) for row in item.rows), ""
