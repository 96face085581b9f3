"""Texts become documents; the hold-out is the last part of every one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from mainspring.errors import RecipeError
from mainspring.train.recipe import DataSection
from mainspring.train.sources import Corpus


def test_directories_archives_and_files_give_their_matching_texts_in_order(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    (texts / "b.txt").write_text("B")
    (texts / "a.txt").write_text("A")
    (texts / "sub" / "c.txt").write_text("C")
    (texts / "no.md").write_text("no")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in ("pkg/texts/z_gut.txt", "pkg/texts/y_gut_f.txt", "pkg/other/w_gut.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(name[10:11].encode()))
    (tmp_path / "plain.md").write_text("P")
    sources = (str(texts), str(tmp_path / "plain.md"))
    assert [d.text for d in Corpus(DataSection(sources=sources))] == ["A", "B", "C", "P"]
    data = DataSection(sources=(str(tmp_path / "x.tar.gz"),), members="*/texts/*_gut.txt")
    assert [d.name for d in Corpus(data)] == ["pkg/texts/z_gut.txt"]


def test_the_holdout_is_the_last_fraction_of_every_text_by_bytes(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(bytes(range(65, 85)) * 10)
    (tmp_path / "short.txt").write_bytes(b"abc")
    long, short = Corpus(DataSection(sources=(str(tmp_path),), holdout_fraction=0.05))
    assert (len(long.text), len(long.holdout), long.text_bytes, long.holdout_bytes) == (190, 10, 190, 10)
    assert (short.text, short.holdout, short.holdout_bytes) == ("abc", "", 0)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_no_character_is_cut_and_no_byte_lost(tmp_path: Path, fraction: float) -> None:
    raw = "héé\r\n€uro 🎻🎻🎻".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (document,) = Corpus(DataSection(sources=(str(tmp_path),), holdout_fraction=fraction))
    assert (document.text + document.holdout).encode() == raw
    assert len(document.holdout.encode()) == document.holdout_bytes >= int(len(raw) * fraction)
    assert document.text_bytes + document.holdout_bytes == len(raw)


def test_the_fingerprint_follows_contents_and_settings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    corpus = Corpus(DataSection(sources=(str(tmp_path),)))
    before = corpus.fingerprint(512)
    assert corpus.fingerprint(512) == before
    assert corpus.fingerprint(513) != before
    (tmp_path / "a.txt").write_text("two")
    assert corpus.fingerprint(512) != before


@pytest.mark.parametrize(
    ("sources", "members", "message"),
    [
        (("missing",), "*", "does not exist"),
        ((".",), "*.nothing", "matches data.members"),
        (("broken.tar.gz",), "*", "cannot read 'broken.tar.gz'"),
        (("latin.txt",), "*", "byte 1 is not valid utf-8"),
    ],
)
def test_bad_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...], members: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8bnot an archive")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9b")
    with pytest.raises(RecipeError, match=message):
        list(Corpus(DataSection(sources=sources, members=members)))
