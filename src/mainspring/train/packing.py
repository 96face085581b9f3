"""Cuts documents into windows and packs whole windows into micro-batches.

A window of a document is at most `sequence_length` tokens and their successors as targets. Windows of one
document lie end to end, so each token but a document's first is a target exactly once an epoch. Attention
never crosses a window's boundary, and every window's positions start at 0, as a prompt's do. Where the
first boundary falls is drawn anew for every document and epoch, so that over the epochs each token is seen
with short and long context.

Everything is a function of (seed, epoch): a run resumes at (epoch, index of the micro-batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mainspring.errors import RecipeError
from mainspring.train.shard_set import ShardSet
from mainspring.train.shards import TokenShard

_OPEN_BATCHES = 32


@dataclass(frozen=True)
class MicroBatch:
    """Windows packed end to end.

    tokens: [T] int64; targets: [T] int64, the token after each; lengths: of the windows, they sum to T.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class DataPosition:
    """The next micro-batch that a stream gives."""

    epoch: int = 0
    index: int = 0


class PackedStream:
    """An endless, resumable stream of micro-batches of at most `tokens_per_batch` tokens over a corpus.

    windows: an epoch's, in the order in which they come, where they are not all of the corpus (`blending.py`).
    Raises RecipeError if no document has two tokens.
    """

    def __init__(
        self,
        shard: TokenShard | ShardSet,
        sequence_length: int,
        tokens_per_batch: int,
        seed: int,
        position: DataPosition = DataPosition(),
        windows: Callable[[int], NDArray[np.int64]] | None = None,
    ) -> None:
        self._shard, self._windows = shard, windows
        self._sequence_length = sequence_length
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self.position = position
        self._plan_epoch = -1
        self._plan: list[NDArray[np.int64]] = []
        self.tokens_per_epoch = targets_of(shard.offsets.astype(np.int64))
        if self.tokens_per_epoch == 0:
            raise RecipeError(f"{shard.path}: no document has two tokens; there is nothing to predict")

    def __next__(self) -> MicroBatch:
        if self._plan_epoch != self.position.epoch:
            self._plan = self._plan_of(self.position.epoch)
            self._plan_epoch = self.position.epoch
        windows = self._plan[self.position.index]
        if self.position.index + 1 < len(self._plan):
            self.position = DataPosition(self.position.epoch, self.position.index + 1)
        else:
            self.position = DataPosition(self.position.epoch + 1, 0)
        pieces = [self._shard.read(int(start), int(length) + 1) for start, length in windows]
        tokens = np.concatenate([piece[:-1] for piece in pieces])
        targets = np.concatenate([piece[1:] for piece in pieces])
        return MicroBatch(
            tokens.astype(np.int64), targets.astype(np.int64), tuple(int(n) for n in windows[:, 1])
        )

    def __iter__(self) -> PackedStream:
        return self

    def _plan_of(self, epoch: int) -> list[NDArray[np.int64]]:
        if self._windows is not None:
            return _pack(self._windows(epoch), self._tokens_per_batch)
        return plan_epoch(self._shard, self._sequence_length, self._tokens_per_batch, self._seed, epoch)


def targets_of(offsets: NDArray[np.int64]) -> int:
    """Tokens of the documents that are targets: all but the first of each."""
    return int(np.maximum(np.diff(offsets) - 1, 0).sum())


def plan_epoch(
    shard: TokenShard | ShardSet, sequence_length: int, tokens_per_batch: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """One epoch's micro-batches, each [windows, 2]: (first token in the shard, length)."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    windows = cut_windows(shard.offsets.astype(np.int64), sequence_length, random)
    return _pack(windows[random.permutation(len(windows))], tokens_per_batch)


def cut_windows(
    offsets: NDArray[np.int64], sequence_length: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """All windows [W, 2] of the documents whose offsets are given, in their order."""
    targets = np.diff(offsets) - 1
    begins, targets = offsets[:-1][targets > 0], targets[targets > 0]
    # A document that fits stays whole; a longer one begins with a window of random length.
    first = np.zeros_like(targets)
    is_long = targets > sequence_length
    first[is_long] = random.integers(sequence_length, size=int(is_long.sum()))
    counts = -(-(targets - first) // sequence_length) + (first > 0)
    document = np.repeat(np.arange(len(targets)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Of the whole windows; the random one before them is number -1.
    number -= first[document] > 0
    starts = np.where(number < 0, 0, first[document] + number * sequence_length)
    ends = np.minimum(first[document] + (number + 1) * sequence_length, targets[document])
    return np.stack([begins[document] + starts, ends - starts], axis=1)


def _pack(windows: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """First fit: each window goes to the oldest open batch with room; batches keep the windows' (random) order.

    Windows are never split. A batch is given out when it is full, or when _OPEN_BATCHES younger ones are open.
    """
    finished: list[list[int]] = []
    open_batches: list[tuple[int, list[int]]] = []  # (room, windows), oldest first
    for index, length in enumerate(windows[:, 1].tolist()):
        for slot, (room, members) in enumerate(open_batches):
            if length <= room:
                members.append(index)
                if room == length:
                    finished.append(open_batches.pop(slot)[1])
                else:
                    open_batches[slot] = (room - length, members)
                break
        else:
            if len(open_batches) == _OPEN_BATCHES:
                finished.append(open_batches.pop(0)[1])
            open_batches.append((capacity - length, [index]))
            if length == capacity:
                finished.append(open_batches.pop()[1])
    finished.extend(members for _, members in open_batches)
    return [windows[members] for members in finished]
