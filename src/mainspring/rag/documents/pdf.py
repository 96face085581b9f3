"""PDF as text, page by page, by PDFium."""

from __future__ import annotations

import re
from pathlib import Path

import pypdfium2

from mainspring.errors import DocumentError
from mainspring.rag.documents.document import Extract, Mark, Place


def read_pdf(path: Path, data: bytes) -> Extract:
    """The text of every page. Raises DocumentError if the file is corrupt, encrypted, or only pictures."""
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        reason = "needs a password" if "password" in str(error).lower() else f"is corrupt ({error})"
        raise DocumentError(f"the PDF {path} {reason}: repair or remove it") from error
    pieces: list[str] = []
    marks: list[Mark] = []
    length = 0
    try:
        for number in range(len(pdf)):
            text = _page(pdf, number)
            marks.append(Mark(length, Place("page", number + 1)))
            pieces.append(text + "\n\n")
            length += len(text) + 2
        title = (pdf.get_metadata_dict(skip_empty=True).get("Title") or "").strip()
    except pypdfium2.PdfiumError as error:
        raise DocumentError(f"page {len(marks) + 1} of the PDF {path} is corrupt ({error})") from error
    finally:
        pdf.close()
    text = "".join(pieces)
    if not text.strip():
        raise DocumentError(
            f"the PDF {path} has {len(marks)} pages without text: recognise its characters first (OCR)"
        )
    return Extract(text, marks=marks, title=title or None)


def _page(pdf: pypdfium2.PdfDocument, number: int) -> str:
    page = pdf[number]
    try:
        text_page = page.get_textpage()
        try:
            text = text_page.get_text_range()
        finally:
            text_page.close()
    finally:
        page.close()
    text = (
        text.replace("\r\n", "\n").replace("\ufffe\n", "").replace("\ufffe", "")
    )  # PDFium's mark of a soft hyphen
    return re.sub(r"[ \t]+\n", "\n", text).rstrip()
