"""Cutting documents: nothing is lost, nothing is too long, sentences and sections hold."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainspring.errors import ConfigError, PassageTooLongError
from mainspring.rag.chunking.chunk import Chunker
from mainspring.rag.chunking.chunkers import SlidingWindowChunker, SmallToBigChunker, SplitChunker
from mainspring.rag.chunking.sentences import sentence_spans, sentences
from mainspring.rag.documents.document import Document
from mainspring.rag.documents.reading import FoundFile, read_document
from mainspring.rag.embedding.embedder import Embedder
from rag.fakes import WordEmbedder

CHUNKERS = [
    SplitChunker(20, 5),
    SplitChunker(20, 5, "token"),
    SplitChunker(500, 0, headers=False),
    SmallToBigChunker(10, 40),
    SlidingWindowChunker(12, 2),
]


def markdown(text: str) -> Document:
    return read_document(FoundFile(Path("a.md"), "a.md", len(text)), text.encode())


def story(seed: int, sentences: int = 60) -> str:
    generator = random.Random(seed)
    parts = []
    for n in range(sentences):
        words = [
            generator.choice(["alpha", "beta", "gamma", "delta", "epsilon"])
            for _ in range(generator.randint(1, 30))
        ]
        parts.append(" ".join(words).capitalize() + f" {n}.")
        if generator.random() < 0.2:
            parts.append("\n\n" + "#" * generator.randint(1, 3) + f" Part {n}\n")
    return " ".join(parts)


@pytest.mark.parametrize("chunker", CHUNKERS, ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(3))
def test_every_word_is_in_a_chunk_and_every_chunk_fits_and_knows_its_place(
    chunker: Chunker, seed: int
) -> None:
    embedder = WordEmbedder()
    document = markdown(story(seed))
    chunks = chunker.split(document, embedder)
    covered = set()
    for chunk in chunks:
        assert document.text[chunk.start : chunk.end] == chunk.text
        assert chunk.text in chunk.context
        assert chunk.context == document.text[chunk.context_start : chunk.context_start + len(chunk.context)]
        assert chunk.tokens == embedder.count(chunk.indexed_text) <= embedder.window
        assert chunk.place == document.place(chunk.start)
        middle = len(chunk.context) // 2
        assert chunk.place_in_context(middle) == document.place(chunk.context_start + middle)
        covered |= set(range(chunk.start, chunk.end))
    missing = [i for i, c in enumerate(document.text) if i not in covered and not c.isspace()]
    assert missing == []
    assert len({chunk.id for chunk in chunks}) == len(chunks)


def test_sentence_chunks_begin_and_end_at_sentences_and_overlap_by_whole_ones() -> None:
    text = " ".join(f"This is sentence number {n}." for n in range(40))
    chunks = SplitChunker(24, 8, headers=False).split(markdown(text), WordEmbedder())
    for chunk in chunks:
        assert re.fullmatch(r"(This is sentence number \d+\. ?)+", chunk.text)
    for left, right in itertools.pairwise(chunks):
        shared = set(sentences(left.text)) & set(sentences(right.text))
        assert len(shared) == 1


def test_headers_name_title_and_headings_and_are_not_part_of_the_text() -> None:
    text = "# Manual\n" + "intro " * 30 + "\n## Pumps\n" + "water " * 30
    chunk = SplitChunker(30, 0).split(markdown(text), WordEmbedder())[-1]
    assert chunk.header == "Manual > Pumps"
    assert chunk.indexed_text.startswith("Manual > Pumps\n")
    assert "Manual" not in chunk.text


def test_short_neighbouring_sections_share_a_chunk_with_the_headings_they_share() -> None:
    text = "# A\n" + "".join(f"## S{n}\nword {n}\n" for n in range(3))
    chunks = SplitChunker(40, 0).split(markdown(text), WordEmbedder())
    assert [c.text.count("word") for c in chunks] == [3]
    assert chunks[0].header == "A" or chunks[0].header == "a"


def test_small_to_big_finds_the_small_and_reads_the_big() -> None:
    chunks = SmallToBigChunker(10, 40, headers=False).split(markdown(story(1)), WordEmbedder(window=64))
    assert max(len(c.text) for c in chunks) < max(len(c.context) for c in chunks)
    assert len({c.context_start for c in chunks}) < len(chunks)


def test_one_endless_word_run_without_sentences_is_cut_at_tokens() -> None:
    chunks = SplitChunker(16, 0, headers=False).split(markdown("word " * 500), WordEmbedder())
    assert all(c.tokens <= 18 for c in chunks)
    assert sum(c.text.count("word") for c in chunks) == 500


@given(st.text(alphabet="aB. !?\n1)", max_size=80))
def test_sentences_hold_every_character_that_is_no_white_space(text: str) -> None:
    spans = sentence_spans(text)
    assert "".join(text[a:b] for a, b in spans if a < b).replace(" ", "").replace("\n", "") == re.sub(
        r"\s", "", text
    )
    assert all(text[a:b] == text[a:b].strip() for a, b in spans)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Smith came. He left.", ["Dr. Smith came.", "He left."]),
        ("See Fig. 3 for J. R. Tolkien. Yes!", ["See Fig. 3 for J. R. Tolkien.", "Yes!"]),
        ('He said "no." Then it rained.', ['He said "no."', "Then it rained."]),
        ("Version 1.2 is out. 3 bugs.", ["Version 1.2 is out.", "3 bugs."]),
        ("- one\n- two", ["- one", "- two"]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@pytest.mark.parametrize(("size", "overlap"), [(4, 0), (20, 20), (20, -1)])
def test_sizes_that_make_no_sense_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"chunk needs at least|overlap"):
        SplitChunker(size, overlap)


def test_the_real_tokenizer_never_gets_a_chunk_beyond_its_window(minilm: Embedder) -> None:
    text = "# T\n" + "Ünïcödé-Wörter, 12345.678 and https://example.org/a_b?c=d&e=f " * 200
    chunks = SplitChunker(1000, 0).split(markdown(text), minilm)
    assert all(c.tokens == minilm.count(c.indexed_text) <= 256 for c in chunks)
    with pytest.raises(PassageTooLongError, match="takes 256; nothing is cut silently"):
        minilm.embed_passages([text])
