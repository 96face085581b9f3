"""From texts to token shards: trains or reads the tokenizer, encodes, writes. Done once for each state of the texts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mainspring.errors import RecipeError
from mainspring.formats.files import new_directory, write_json
from mainspring.train.blending import Source, blended_windows
from mainspring.train.packing import DataPosition, PackedStream
from mainspring.train.recipe import DataSection, Recipe
from mainspring.train.shard_set import ShardSet, ShardSetWriter
from mainspring.train.sources import Corpus, Document
from mainspring.train.text_tokenizer import TextTokenizer

_DOCUMENTS_AT_A_TIME = 64


@dataclass(frozen=True)
class PreparedData:
    """What training reads. Document i of `holdout` continues document i of `train`."""

    tokenizer: TextTokenizer
    train: ShardSet
    holdout: ShardSet
    train_bytes: int
    holdout_bytes: int
    fingerprint: str
    """Of the texts and of how they are blended: a run that resumes has the same."""
    blend: tuple[Source, ...] = ()
    """The sources with their weights; empty: every text once an epoch."""

    def stream(
        self, sequence_length: int, tokens_per_batch: int, seed: int, position: DataPosition
    ) -> PackedStream:
        """The micro-batches to train on, from a position on. Raises RecipeError where there are none."""
        windows = None
        if self.blend:
            windows = partial(blended_windows, self.train.offsets, self.blend, sequence_length, seed)
        return PackedStream(self.train, sequence_length, tokens_per_batch, seed, position, windows)


def prepare(recipe: Recipe, directory: Path, say: Callable[[str], None]) -> PreparedData:
    """The recipe's data in `directory`, made there unless it was made from the same texts and settings before.

    Raises RecipeError for texts that cannot be read, TokenizerError for an unusable tokenizer. A failure
    leaves the directory as it was.
    """
    corpus = Corpus(recipe.data)
    existing = recipe.model.init_from or recipe.tokenizer.path
    fingerprint = corpus.fingerprint(existing or recipe.tokenizer.vocab_size)
    if _recorded_fingerprint(directory) != fingerprint:
        if existing:
            tokenizer = TextTokenizer.read(Path(existing).expanduser())
        else:
            say(f"training a byte-level BPE of {recipe.tokenizer.vocab_size} entries")
            tokenizer = TextTokenizer.train(
                (document.text for document in corpus), recipe.tokenizer.vocab_size
            )
        say("encoding the texts")
        if directory.exists():
            shutil.rmtree(directory)
        with new_directory(directory) as folder:
            _write(corpus, tokenizer, folder, fingerprint, recipe.data.shard_tokens)
    prepared = _open(directory, recipe.data)
    say(
        f"{prepared.train.num_documents} documents: {prepared.train.num_tokens:,} tokens to train on "
        f"({prepared.train_bytes:,} bytes), {prepared.holdout.num_tokens:,} held out "
        f"({prepared.holdout_bytes:,} bytes)"
    )
    return prepared


def _recorded_fingerprint(directory: Path) -> str | None:
    try:
        recorded = json.loads((directory / "data.json").read_text())
    except (OSError, ValueError):
        return None
    return str(recorded.get("fingerprint")) if "shards" in recorded else None


def _open(directory: Path, data: DataSection) -> PreparedData:
    record = json.loads((directory / "data.json").read_text())
    train, holdout = (
        ShardSet([directory / file for file in record["shards"][name]]) for name in ("train", "holdout")
    )
    fingerprint: str = record["fingerprint"]
    blend: tuple[Source, ...] = ()
    if data.weights:
        fingerprint = f"{fingerprint}:{','.join(map(repr, data.weights))}"
        blend = _blend(data, record, train.num_documents)
    return PreparedData(
        tokenizer=TextTokenizer.read(directory),
        train=train,
        holdout=holdout,
        train_bytes=record["train_bytes"],
        holdout_bytes=record["holdout_bytes"],
        fingerprint=fingerprint,
        blend=blend,
    )


def _blend(data: DataSection, record: dict[str, Any], documents: int) -> tuple[Source, ...]:
    ends = list(accumulate(record["source_documents"]))
    assert ends[-1] == documents  # written together
    return tuple(
        Source(name, first, last, weight)
        for name, first, last, weight in zip(data.sources, [0, *ends], ends, data.weights, strict=False)
    )


def _write(
    corpus: Corpus, tokenizer: TextTokenizer, directory: Path, fingerprint: str, shard_tokens: int
) -> None:
    train_bytes = holdout_bytes = 0
    source_documents: Counter[int] = Counter()
    end = np.asarray([tokenizer.end_of_text], dtype=np.int64)
    with ExitStack() as stack:
        train, holdout = (
            stack.enter_context(ShardSetWriter(directory, name, tokenizer.vocab_size, shard_tokens))
            for name in ("train", "holdout")
        )
        for documents in _in_batches(corpus):
            heads = tokenizer.encode([document.text for document in documents])
            tails = tokenizer.encode([document.holdout for document in documents])
            for document, head, tail in zip(documents, heads, tails, strict=True):
                # A text whose tail is held out does not end where its training part does.
                train.add(np.concatenate([end, head, end[len(tail) > 0 :]]))
                holdout.add(tail)
                source_documents[document.source] += 1
                train_bytes += document.text_bytes
                holdout_bytes += document.holdout_bytes
    if train_bytes == 0:
        raise RecipeError("data.sources: all texts are empty; there is nothing to train on")
    tokenizer.save(directory)
    record = {
        "fingerprint": fingerprint,
        "train_bytes": train_bytes,
        "holdout_bytes": holdout_bytes,
        "shards": {"train": train.names, "holdout": holdout.names},
        "source_documents": [source_documents[number] for number in sorted(source_documents)],
    }
    write_json(directory / "data.json", record)


def _in_batches(corpus: Corpus) -> Iterator[tuple[Document, ...]]:
    batch: list[Document] = []
    for document in corpus:
        batch.append(document)
        if len(batch) == _DOCUMENTS_AT_A_TIME:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)
