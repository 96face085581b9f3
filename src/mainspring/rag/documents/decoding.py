"""Bytes as text: UTF-8, UTF-16 with its mark, else Latin-1; binary files are refused."""

from __future__ import annotations

import codecs
from pathlib import Path

from mainspring.errors import DocumentError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PROBE = 8192


def decode(path: Path, data: bytes) -> str:
    """The text of a file, line ends as \\n. Raises DocumentError for one that is binary."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return _lines(data.decode(encoding))
            except UnicodeDecodeError as error:
                raise DocumentError(f"{path} begins like {encoding} text but is not: {error}") from error
    head = data[:_PROBE]
    control = sum(byte < 9 or 13 < byte < 27 for byte in head)
    if b"\0" in head or control > len(head) // 10:
        raise DocumentError(f"{path} is binary, not text: leave it out or convert it")
    try:
        return _lines(data.decode("utf-8"))
    except UnicodeDecodeError:
        return _lines(data.decode("latin-1"))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
