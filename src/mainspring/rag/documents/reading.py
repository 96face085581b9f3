"""Which files of a folder are documents, and each one's reader."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mainspring.errors import DocumentError, EmptyCorpusError
from mainspring.rag.documents.document import Document, Reader, document
from mainspring.rag.documents.docx import read_docx
from mainspring.rag.documents.html import read_html
from mainspring.rag.documents.notebook import read_notebook
from mainspring.rag.documents.pdf import read_pdf
from mainspring.rag.documents.source_code import GRAMMARS, read_source_code
from mainspring.rag.documents.text import read_markdown, read_restructured_text, read_text

READERS: Mapping[str, Reader] = {
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".txt": read_text,
    ".text": read_text,
    ".log": read_text,
    ".csv": read_text,
    ".rst": read_restructured_text,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".ipynb": read_notebook,
    **dict.fromkeys(GRAMMARS, read_source_code),
}
MAX_BYTES = 100 << 20  # of one file: what is larger is data, not a document
MAX_CHARACTERS = 10_000_000  # of its text, about 4,000 pages: its tokens are held in memory


@dataclass(frozen=True)
class FoundFile:
    """A file that has a reader: where it is, and its name relative to the folder, with forward slashes."""

    path: Path
    name: str
    size: int


def find_files(folder: Path, exclude: Sequence[Path] = ()) -> list[FoundFile]:
    """Every file below `folder` that has a reader, sorted by name.

    Hidden files and folders are passed over, and what lies in `exclude`; symbolic links to folders are not followed.
    Raises EmptyCorpusError if the folder is not there or holds no such file.
    """
    if not folder.is_dir():
        raise EmptyCorpusError(f"there is no folder {folder}")
    found = sorted(walk(folder, READERS, exclude), key=lambda file: file.name)
    if not found:
        kinds = ", ".join(READERS)
        raise EmptyCorpusError(f"{folder} holds no document; the kinds that are read: {kinds}")
    return found


def walk(folder: Path, suffixes: Collection[str], exclude: Sequence[Path] = ()) -> Iterator[FoundFile]:
    """The files below a folder whose names end so, in no order; what is passed over is that of `find_files`."""
    left_out = {path.resolve() for path in exclude}
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() not in left_out]
        for name in names:
            path = here / name
            if not name.startswith(".") and path.suffix.lower() in suffixes and path.is_file():
                yield FoundFile(path, path.relative_to(folder).as_posix(), path.stat().st_size)


def read_bytes(file: FoundFile) -> bytes:
    """A file's bytes. Raises DocumentError if it cannot be read or has more than MAX_BYTES."""
    if file.size > MAX_BYTES:
        raise DocumentError(f"{file.path} has {file.size} bytes; a document may have {MAX_BYTES}: split it")
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise DocumentError(f"{file.path} cannot be read: {error.strerror}") from error


def read_document(file: FoundFile, data: bytes) -> Document:
    """The document in a file's bytes. Raises DocumentError, also for more than MAX_CHARACTERS of text."""
    extract = READERS[file.path.suffix.lower()](file.path, data)
    if len(extract.text) > MAX_CHARACTERS:
        raise DocumentError(
            f"{file.path} has {len(extract.text)} characters; at most {MAX_CHARACTERS} are read: split it"
        )
    return document(file.name, data, extract)
