"""Token shards hold what was put in, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import CheckpointError, RecipeError
from mainspring.train.shards import ShardWriter, TokenShard


def _write(path: Path, documents: list[list[int]], vocab_size: int = 1000) -> None:
    with ShardWriter(path, vocab_size) as writer:
        for document in documents:
            writer.add(np.asarray(document, dtype=np.int64))


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), max_size=9), max_size=6),
    vocab_size=st.sampled_from([70_000, 1 << 20]),
)
def test_round_trip_with_wide_tokens(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.tokens"
    _write(path, documents, vocab_size)
    shard = TokenShard(path)
    assert shard.tokens.dtype.itemsize == 4
    assert shard.num_documents == len(documents)
    assert [shard.document(i).tolist() for i in range(len(documents))] == documents


def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path) -> None:
    _write(tmp_path / "a.tokens", [[1, 2, 3], [], [65_535]], 1 << 16)
    shard = TokenShard(tmp_path / "a.tokens")
    assert shard.tokens.dtype == np.dtype("<u2")
    assert [shard.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [65_535]]
    raw = (tmp_path / "a.tokens").read_bytes()
    assert raw[:8] == b"MSTOKENS"
    assert raw[64:66] == (1).to_bytes(2, "little")
    assert len(raw) == 64 + 8 + 4 * 8


def test_a_token_outside_the_vocabulary_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="1000 lies outside the vocabulary of 1000"):
        _write(tmp_path / "a.tokens", [[1], [1000]])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_file(tmp_path: Path) -> None:
    _write(tmp_path / "a.tokens", [[7, 8]])
    with pytest.raises(RecipeError):
        _write(tmp_path / "a.tokens", [[-1]])
    assert TokenShard(tmp_path / "a.tokens").document(0).tolist() == [7, 8]
    assert [p.name for p in tmp_path.iterdir()] == ["a.tokens"]


@pytest.mark.parametrize("keep", [0, 10, 63, 70, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    _write(tmp_path / "a.tokens", [[1, 2, 3]])
    raw = (tmp_path / "a.tokens").read_bytes()
    (tmp_path / "a.tokens").write_bytes(raw[:keep])
    with pytest.raises(CheckpointError):
        TokenShard(tmp_path / "a.tokens")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tokens").write_bytes(b"x" * 200)
    with pytest.raises(CheckpointError, match="no token shard"):
        TokenShard(tmp_path / "a.tokens")
