"""Sources are blended by weight: exact shares, every window once a pass, and the same stream wherever a run resumes."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import CheckpointError, RecipeError
from mainspring.train.blending import Source, blended_windows
from mainspring.train.packing import DataPosition
from mainspring.train.prepare import PreparedData, prepare
from mainspring.train.recipe_file import parse_recipe
from mainspring.train.shard_set import ShardSet, ShardSetWriter
from mainspring.train.shards import ShardWriter


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=8), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20.0), min_size=4, max_size=4),
    sequence_length=st.integers(2, 24),
    seed=st.integers(0, 99),
)
def test_shares_are_the_weights_and_no_window_comes_again_before_all_have_been(
    lengths: list[list[int]], weights: list[float], sequence_length: int, seed: int
) -> None:
    offsets = np.cumsum([0] + [n for source in lengths for n in source])
    firsts = np.cumsum([0] + [len(source) for source in lengths])
    sources = [Source(f"s{i}", int(firsts[i]), int(firsts[i + 1]), weights[i]) for i in range(len(lengths))]
    epochs = [blended_windows(offsets, sources, sequence_length, seed, epoch) for epoch in range(5)]
    all_windows = np.concatenate(epochs)
    total = sum(n - 1 for source in lengths for n in source)
    for source in sources:
        begin, end = int(offsets[source.first]), int(offsets[source.last])
        own = all_windows[(all_windows[:, 0] >= begin) & (all_windows[:, 0] < end)]
        share = source.weight / sum(s.weight for s in sources)
        assert abs(int(own[:, 1].sum()) - 5 * share * total) <= 2 * sequence_length
        targets = Counter(t for start, n in own.tolist() for t in range(start + 1, start + n + 1))
        documents = {int(o) for o in offsets}
        passes = 5 * share * total / sum(n - 1 for n in lengths[sources.index(source)])
        for token in range(begin, end):
            if token not in documents:  # a document's first token is no target
                assert int(passes) <= targets[token] <= int(passes) + 1
    again = blended_windows(offsets, sources, sequence_length, seed, 3)
    assert np.array_equal(again, epochs[3])


RECIPE = """
output = "out"
seed = 4
[data]
sources = ["small.txt", "large"]
weights = [3, 1]
shard_tokens = 150
[tokenizer]
vocab_size = 258
[training]
sequence_length = 16
tokens_per_micro_batch = 64
"""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("s" * 100)
    Path("large").mkdir()
    for i in range(9):
        Path(f"large/{i}.txt").write_text("L" * 50)
    return prepare(parse_recipe(RECIPE), Path("out/data"), lambda text: None)


def test_a_recipe_blends_its_sources_over_several_files_and_resumes_anywhere(prepared: PreparedData) -> None:
    assert len(list(Path("out/data").glob("train-*.tokens"))) > 2
    assert [(s.name, s.first, s.last, s.weight) for s in prepared.blend] == [
        ("small.txt", 0, 1, 3.0), ("large", 1, 10, 1.0),
    ]  # fmt: skip
    stream = prepared.stream(16, 64, 4, DataPosition())
    seen, positions = [], []
    for _ in range(60):
        positions.append(stream.position)
        seen.append(next(stream))
    texts = [prepared.tokenizer.decode([token]) for batch in seen for token in batch.targets.tolist()]
    small, large = (sum(letter in text for text in texts) for letter in "sL")
    assert small / (small + large) == pytest.approx(0.75, abs=0.03)
    assert positions[-1].epoch > 1
    for at in (7, 31, 59):
        resumed = prepared.stream(16, 64, 4, positions[at])
        for again, batch in zip(islice(resumed, 60 - at), seen[at:], strict=True):
            assert np.array_equal(again.tokens, batch.tokens)
            assert again.lengths == batch.lengths


def test_other_weights_are_another_run(prepared: PreparedData) -> None:
    other = prepare(parse_recipe(RECIPE, overrides=["data.weights=[1, 1]"]), Path("out/data"), print)
    none = prepare(parse_recipe(RECIPE, overrides=["data.weights=[]"]), Path("out/data"), print)
    assert len({prepared.fingerprint, other.fingerprint, none.fingerprint}) == 3
    assert none.blend == ()


@pytest.mark.parametrize("weights", ["[1]", "[1, 0]", "[1, -2]", "[1, inf]", "[1, 2, 3]"])
def test_weights_that_do_not_fit_the_sources_are_refused(weights: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.weights.*each of the 2 data\.sources a number above 0"):
        parse_recipe(RECIPE, overrides=[f"data.weights={weights}"])


def test_a_source_without_targets_is_refused() -> None:
    with pytest.raises(RecipeError, match="empty: no document has two tokens"):
        blended_windows(np.array([0, 1, 9]), [Source("empty", 0, 1, 1.0), Source("b", 1, 2, 1.0)], 4, 0, 0)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=9),
    most=st.integers(1, 12),
)
def test_a_set_of_shards_reads_as_one(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], most: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    with ShardSetWriter(folder, "t", 300, most) as writer:
        for document in documents:
            writer.add(np.asarray(document, dtype=np.int64))
    shards = ShardSet([folder / name for name in writer.names])
    assert sorted(path.name for path in folder.iterdir()) == writer.names
    assert [shards.document(i).tolist() for i in range(len(documents))] == documents
    assert shards.num_documents == len(documents)
    assert shards.offsets.tolist() == np.cumsum([0] + [len(d) for d in documents]).tolist()
    for document, begin in zip(documents, shards.offsets[:-1].tolist(), strict=True):
        if document:
            assert shards.read(begin, len(document)).tolist() == document
    for name in writer.names:  # none is longer than allowed but for a document that is
        held = ShardSet([folder / name])
        assert held.num_tokens <= max(most, max(np.diff(held.offsets), default=0))


def test_shards_of_two_tokenizers_are_no_set(tmp_path: Path) -> None:
    for name, vocab in (("a", 10), ("b", 11)):
        with ShardWriter(tmp_path / name, vocab) as writer:
            writer.add(np.asarray([1, 2]))
    with pytest.raises(CheckpointError, match=r"vocabulary of 11.*one of 10"):
        ShardSet([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(CheckpointError, match="at least one"):
        ShardSet([])
