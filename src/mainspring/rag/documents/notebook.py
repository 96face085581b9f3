"""Jupyter notebooks as text: the cells' sources and their text outputs, places as cells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mainspring.errors import DocumentError
from mainspring.rag.documents.decoding import decode
from mainspring.rag.documents.document import Extract, Mark, Place

_HEADING = re.compile(r"^(#{1,6})\s+(.+)$", re.MULTILINE)


def read_notebook(path: Path, data: bytes) -> Extract:
    """Markdown and code cells of an nbformat 4 notebook. Raises DocumentError if it is none."""
    try:
        cells = json.loads(decode(path, data))["cells"]
        sources = [
            (str(cell["cell_type"]), _joined(cell["source"]), cell.get("outputs") or []) for cell in cells
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is not a Jupyter notebook of format 4 ({error!r})") from error
    pieces: list[str] = []
    marks: list[Mark] = []
    headings: list[tuple[int, int, str]] = []
    length = 0
    for number, (kind, source, outputs) in enumerate(sources, 1):
        marks.append(Mark(length, Place("cell", number)))
        if kind == "markdown":
            headings.extend((length + m.start(), len(m[1]), m[2].strip()) for m in _HEADING.finditer(source))
        text = "\n".join(part for part in (source, *map(_output_text, outputs)) if part)
        pieces.append(text + "\n\n")
        length += len(text) + 2
    return Extract("".join(pieces), headings, marks)


def _joined(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _output_text(output: dict[str, Any]) -> str:
    """What a cell printed; pictures and HTML are left out."""
    text = output.get("text") or (output.get("data") or {}).get("text/plain") or ""
    return _joined(text).rstrip()
