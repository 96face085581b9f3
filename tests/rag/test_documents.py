"""Files as documents: text, headings and places of every format, and files that are not what they seem."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import docx
import pytest

from mainspring.errors import DocumentError, EmptyCorpusError
from mainspring.rag.documents import reading
from mainspring.rag.documents.document import Document
from mainspring.rag.documents.reading import MAX_BYTES, FoundFile, find_files, read_bytes, read_document
from support.documents import pdf_bytes


def read(name: str, data: bytes) -> Document:
    return read_document(FoundFile(Path(name), name, len(data)), data)


def headings_of(document: Document, text: str) -> tuple[str, ...]:
    offset = document.text.index(text)
    return next(s.headings for s in document.sections if s.start <= offset < s.end)


def place_of(document: Document, text: str) -> str:
    return str(document.place(document.text.index(text)))


def test_markdown_keeps_its_text_and_knows_headings_and_lines() -> None:
    source = b"---\ntitle: x\n---\n# Guide\nIntro.\n\nSetup\n-----\nRun it.\n```\n# no heading\n```\n### Deep\nEnd.\n"
    found = read("a.md", source)
    assert found.text.encode() == source
    assert found.title == "Guide"
    assert headings_of(found, "Intro.") == ("Guide",)
    assert headings_of(found, "# no heading") == ("Guide", "Setup")
    assert headings_of(found, "End.") == ("Guide", "Setup", "Deep")
    assert place_of(found, "End.") == "line 14"


def test_restructured_text_orders_levels_by_first_use() -> None:
    found = read(
        "a.rst", b"=====\nTitle\n=====\n\nIntro\n\nPart\n====\nBody\n\nSub\n---\nDeep\n\nNext\n====\nLast\n"
    )
    assert headings_of(found, "Body") == ("Title", "Part")
    assert headings_of(found, "Deep") == ("Title", "Part", "Sub")
    assert headings_of(found, "Last") == ("Title", "Next")
    assert place_of(found, "Deep") == "line 13"


def test_html_shows_what_a_reader_sees_with_the_lines_of_the_source() -> None:
    page = b"""<html><head><title>T &amp; U</title><style>p{}</style></head><body>
<script>alert(1)</script><nav>Menu</nav>
<h1>Top</h1><p>One   <b>two</b>
three</p>
<h2>Low</h2><pre>a
  b</pre></body></html>"""
    found = read("a.html", page)
    assert found.title == "T & U"
    assert "One two three" in found.text
    assert "a\n  b" in found.text
    assert not {"alert", "Menu", "p{}"} & set(found.text.replace("(", " ").split())
    assert headings_of(found, "a\n  b") == ("Top", "Low")
    assert place_of(found, "One") == "line 3"


def test_html_nested_deeper_than_pythons_stack_is_read() -> None:
    assert "deep" in read("a.html", b"<div>" * 5000 + b"deep").text


def test_pdf_knows_its_pages() -> None:
    found = read("a.pdf", pdf_bytes(["First page here.", "Second page there."]))
    assert place_of(found, "First") == "page 1"
    assert place_of(found, "Second") == "page 2"


@pytest.mark.parametrize("data", [b"%PDF-1.7 nothing", b"", pdf_bytes(["x"])[:150]])
def test_a_corrupt_pdf_is_a_document_error_that_names_it(data: bytes) -> None:
    with pytest.raises(DocumentError, match=r"bad\.pdf is corrupt"):
        read("bad.pdf", data)


def test_a_pdf_without_text_asks_for_ocr() -> None:
    with pytest.raises(DocumentError, match=r"1 pages without text.*OCR"):
        read("scan.pdf", pdf_bytes([""]))


def test_docx_knows_paragraphs_headings_and_tables() -> None:
    word = docx.Document()
    word.add_heading("Plan", 1)
    word.add_paragraph("First we think.")
    table = word.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "cost", "12"
    buffer = io.BytesIO()
    word.save(buffer)
    found = read("a.docx", buffer.getvalue())
    assert headings_of(found, "First") == ("Plan",)
    assert "cost | 12" in found.text
    assert place_of(found, "First") == "paragraph 2"


def test_a_zip_that_is_no_word_document_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "x")
    for data in (buffer.getvalue(), b"PK\3\4 not a zip"):
        with pytest.raises(DocumentError, match="not a Word document"):
            read("a.docx", data)


def test_notebooks_have_cells_and_outputs() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Study\n", "Why."]},
        {
            "cell_type": "code",
            "source": "print(6 * 7)",
            "outputs": [{"output_type": "stream", "text": ["42\n"]}],
        },
    ]
    found = read("a.ipynb", json.dumps({"cells": cells, "nbformat": 4}).encode())
    assert place_of(found, "42") == "cell 2"
    assert headings_of(found, "Why.") == ("Study",)
    with pytest.raises(DocumentError, match="not a Jupyter notebook"):
        read("a.ipynb", b"[]")


def test_source_code_is_cut_at_definitions_with_what_stands_above_them() -> None:
    code = (
        b'"""\xc3\xa4 module."""\nimport os\n\n\n# Adds.\n@cache\ndef add(a, b):\n    return a + b\n\n\n'
        b"class A:\n    def f(self):\n        pass\n"
    )
    found = read("a.py", code)
    assert headings_of(found, "return a") == ("def add(a, b)",)
    assert headings_of(found, "# Adds.") == ("def add(a, b)",)
    assert headings_of(found, "pass") == ("class A", "def f(self)")
    assert headings_of(found, "import os") == ()
    cpp = read("a.cpp", b"namespace a {\nclass B { void f(int x) { return; } };\nint g() { return 1; }\n}\n")
    assert headings_of(cpp, "return 1") == ("namespace a", "int g()")


@pytest.mark.parametrize("suffix", ["js", "ts", "tsx", "c", "cpp", "rs", "go", "java", "sh"])
def test_every_grammar_reads_even_what_is_not_its_language(suffix: str) -> None:
    text = "function f() { return 1 }\nstruct S { int a; };\n£ ((((\n"
    assert read(f"a.{suffix}", text.encode()).text == text


def test_sections_cover_the_text_without_a_hole() -> None:
    for name, data in (
        ("a.md", b"# A\nx\n# B\n"),
        ("a.py", b"def f():\n  pass\n"),
        ("a.txt", b""),
        ("a.txt", b"x"),
    ):
        found = read(name, data)
        assert found.sections[0].start == 0
        assert found.sections[-1].end == len(found.text)
        for left, right in zip(found.sections, found.sections[1:], strict=False):
            assert left.end == right.start


def test_binary_files_are_refused_and_old_encodings_read() -> None:
    with pytest.raises(DocumentError, match="binary"):
        read("a.txt", bytes(range(256)) * 4)
    assert read("a.txt", "naïve".encode("latin-1")).text == "naïve"
    assert read("a.txt", "naïve\r\n".encode("utf-16")).text == "naïve\n"


def test_finding_passes_over_hidden_files_other_kinds_and_excluded_folders(tmp_path: Path) -> None:
    for name in ("b.md", "a/c.txt", ".git/x.md", ".hidden.md", "picture.png", "index/y.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [f.name for f in find_files(tmp_path, [tmp_path / "index"])] == ["a/c.txt", "b.md"]


def test_an_empty_folder_says_which_kinds_are_read(tmp_path: Path) -> None:
    with pytest.raises(EmptyCorpusError, match=r"holds no document.*\.md"):
        find_files(tmp_path)
    with pytest.raises(EmptyCorpusError, match="no folder"):
        find_files(tmp_path / "absent")


def test_a_text_of_too_many_characters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_CHARACTERS", 10)
    with pytest.raises(DocumentError, match="11 characters; at most 10 are read"):
        read("a.txt", b"x" * 11)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DocumentError, match=f"{MAX_BYTES + 1} bytes; a document may have {MAX_BYTES}"):
        read_bytes(find_files(tmp_path)[0])
