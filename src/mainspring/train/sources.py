"""The texts of a run: files, directories and tar archives become documents, one per file, in a fixed order."""

from __future__ import annotations

import fnmatch
import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mainspring.errors import RecipeError
from mainspring.train.recipe import DataSection

_ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


@dataclass(frozen=True)
class Document:
    """One text, cut into the part that is trained on and the tail that is held out ("" if none is)."""

    name: str
    text: str
    holdout: str
    text_bytes: int
    """Raw bytes of the training part, as they stand in the file; so below for the tail."""
    holdout_bytes: int
    source: int
    """Which of the recipe's sources it is from."""


class Corpus:
    """The documents of a recipe. Iterating reads them anew, one at a time, always in the same order:
    the sources as listed, a directory's files by name, an archive's members as they lie in it.

    Iterating raises RecipeError for a source that does not exist, cannot be read or holds no matching file,
    and for bytes that are not in the stated encoding.
    """

    def __init__(self, data: DataSection) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Document]:
        for source, name, content in self._files():
            yield _split_document(name, content, self._data.encoding, self._data.holdout_fraction, source)

    def fingerprint(self, *settings: object) -> str:
        """A hash of all files' names and bytes and of the settings that shape tokens made from them."""
        digest = hashlib.sha256(repr((self._data.encoding, self._data.holdout_fraction, settings)).encode())
        for _, name, content in self._files():
            for part in (name.encode("utf-8", "surrogateescape"), content):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()

    def _files(self) -> Iterator[tuple[int, str, bytes]]:
        for number, source in enumerate(self._data.sources):
            found = False
            try:
                for name, content in _read_source(Path(source).expanduser(), self._data.members):
                    found = True
                    yield number, name, content
            except FileNotFoundError as error:
                raise RecipeError(
                    f"data.sources: {source!r} does not exist (looked in {Path.cwd()}); "
                    "give the path of a text file, a directory or a tar archive"
                ) from error
            except (OSError, tarfile.TarError, EOFError) as error:
                raise RecipeError(f"data.sources: cannot read {source!r}: {error}") from error
            if not found:
                raise RecipeError(
                    f"data.sources: nothing in {source!r} matches data.members = {self._data.members!r}"
                )


def _read_source(path: Path, members: str) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and fnmatch.fnmatchcase(name, members):
                yield name, file.read_bytes()
    elif path.name.endswith(_ARCHIVE_ENDINGS):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and fnmatch.fnmatchcase(member.name, members):
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file always has one
                    yield member.name, stream.read()
    else:
        yield path.name, path.read_bytes()


def _split_document(
    name: str, content: bytes, encoding: str, holdout_fraction: float, source: int
) -> Document:
    """Cuts off the last `holdout_fraction` of the bytes, at the nearest earlier start of a character."""
    try:
        text = content.decode(encoding)
    except LookupError:
        raise RecipeError(
            f"data.encoding = {encoding!r} is no known text encoding; for example 'utf-8'"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{name}: byte {error.start} is not valid {encoding}; set data.encoding (for example 'latin-1')"
        ) from None
    wanted = int(len(content) * holdout_fraction)
    if wanted == 0:
        return Document(name, text, "", len(content), 0, source)
    for cut in range(len(content) - wanted, max(len(content) - wanted - 8, -1), -1):
        try:
            head, tail = content[:cut].decode(encoding), content[cut:].decode(encoding)
        except UnicodeDecodeError:
            continue
        return Document(name, head, tail, cut, len(content) - cut, source)
    raise RecipeError(f"{name}: data.holdout_fraction cannot cut text in {encoding!r}; convert it to utf-8")
