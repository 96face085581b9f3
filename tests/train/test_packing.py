"""Windows cover every document once an epoch, stay inside it, and come in a resumable order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import RecipeError
from mainspring.train.packing import DataPosition, PackedStream, plan_epoch
from mainspring.train.shards import ShardWriter, TokenShard


def _shard(path: Path, lengths: list[int]) -> TokenShard:
    """Documents whose tokens are all different: token i of the shard is i."""
    total = 0
    with ShardWriter(path, 1 << 20) as writer:
        for length in lengths:
            writer.add(np.arange(total, total + length))
            total += length
    return TokenShard(path)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(lambda ls: max(ls) > 1),
    sequence_length=st.integers(2, 24),
    extra=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_each_token_but_the_first_is_a_target_exactly_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, extra: int, seed: int
) -> None:
    shard = _shard(tmp_path_factory.mktemp("packing") / "a.tokens", lengths)
    capacity = sequence_length + extra
    stream = PackedStream(shard, sequence_length, capacity, seed)
    targets: Counter[int] = Counter()
    while stream.position.epoch == 0:
        batch = next(stream)
        assert sum(batch.lengths) == len(batch.tokens) == len(batch.targets) <= capacity
        assert max(batch.lengths) <= sequence_length
        # Tokens are numbered through: inside a window each follows the last, in one document.
        at = 0
        for length in batch.lengths:
            tokens, following = batch.tokens[at : at + length], batch.targets[at : at + length]
            assert np.array_equal(tokens, np.arange(tokens[0], tokens[0] + length))
            assert np.array_equal(following, tokens + 1)
            document = int(np.searchsorted(shard.offsets, tokens[0], side="right"))
            assert following[-1] < shard.offsets[document]
            at += length
        targets.update(batch.targets.tolist())
    firsts = {int(offset) for offset in shard.offsets}
    assert targets == Counter(t for t in range(shard.num_tokens) if t not in firsts)


def test_short_documents_stay_whole_and_epochs_cut_long_ones_differently(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tokens", [9, 200])
    epochs = [np.concatenate(plan_epoch(shard, 16, 64, seed=3, epoch=e)) for e in range(4)]
    for windows in epochs:
        assert [0, 8] in windows.tolist()
    starts = {tuple(sorted(windows[:, 0].tolist())) for windows in epochs}
    assert len(starts) > 1


def test_a_stream_continues_where_another_stood(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tokens", [300, 40, 500])
    whole = PackedStream(shard, 16, 64, seed=1)
    for _ in range(20):  # into the second epoch
        next(whole)
    assert whole.position.epoch >= 1
    resumed = PackedStream(
        shard, 16, 64, seed=1, position=DataPosition(whole.position.epoch, whole.position.index)
    )
    for _ in range(20):
        a, b = next(whole), next(resumed)
        assert np.array_equal(a.tokens, b.tokens)
        assert a.lengths == b.lengths


def test_batches_are_nearly_full(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tokens", [5000, 3000, 70, 700, 20, 35] * 4)
    batches = plan_epoch(shard, 64, 512, seed=0, epoch=0)
    tokens = sum(int(batch[:, 1].sum()) for batch in batches)
    assert tokens / (512 * len(batches)) > 0.9


def test_a_shard_with_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to predict"):
        PackedStream(_shard(tmp_path / "a.tokens", [1, 0, 1]), 16, 64, seed=0)
