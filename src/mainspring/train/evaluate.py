"""Bits per byte on the held-out tails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mainspring.train.packing import MicroBatch
from mainspring.train.runner import Runner
from mainspring.train.shard_set import ShardSet
from mainspring.train.shards import TokenShard

_IGNORED = -100
_BATCHES_AT_A_TIME = 64


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the held-out text."""

    bits_per_byte: float
    loss: float
    """Mean negative log-likelihood of a held-out token, in nats."""
    tokens: int
    num_bytes: int


@dataclass(frozen=True)
class _Window:
    tokens: NDArray[np.int64]  # [n]
    targets: NDArray[np.int64]  # [n], -100 where another window predicts the token


def evaluate(
    runner: Runner,
    train: TokenShard | ShardSet,
    holdout: TokenShard | ShardSet,
    holdout_bytes: int,
    *,
    sequence_length: int,
    stride: int,
    tokens_per_batch: int,
) -> Evaluation:
    """Every held-out token is predicted exactly once; the sum of -log2 p over the tails' raw bytes.

    Document i of `holdout` continues document i of `train`. Windows of at most `sequence_length` tokens move
    by `stride` tokens: each predicts the last `stride`, the ones before are context, which reaches into the
    document's training part (whose tokens are not counted). Positions start at 0 in each window, as in training.
    """
    total, count = 0.0, 0
    batches = _packed(_windows(train, holdout, sequence_length, stride), tokens_per_batch)
    while some := list(islice(batches, _BATCHES_AT_A_TIME)):
        for value in runner.negative_log_likelihoods(some):
            total += value
        count += sum(int((batch.targets != _IGNORED).sum()) for batch in some)
    return Evaluation(total / math.log(2) / holdout_bytes, total / max(count, 1), count, holdout_bytes)


def _packed(windows: list[_Window], tokens_per_batch: int) -> Iterator[MicroBatch]:
    """The windows end to end, as many as fit, in their order."""
    batch: list[_Window] = []
    room = tokens_per_batch
    for window in windows:
        if batch and len(window.tokens) > room:
            yield _joined(batch)
            batch, room = [], tokens_per_batch
        batch.append(window)
        room -= len(window.tokens)
    if batch:
        yield _joined(batch)


def _joined(windows: list[_Window]) -> MicroBatch:
    return MicroBatch(
        np.concatenate([w.tokens for w in windows]),
        np.concatenate([w.targets for w in windows]),
        tuple(len(w.tokens) for w in windows),
    )


def _windows(
    train: TokenShard | ShardSet, holdout: TokenShard | ShardSet, sequence_length: int, stride: int
) -> list[_Window]:
    windows = []
    for index in range(holdout.num_documents):
        head, tail = train.document(index), holdout.document(index)
        # Only the last tokens of the head can be context; there is at least one, the document's beginning.
        head = head[-sequence_length:]
        tokens = np.concatenate([head, tail]).astype(np.int64)
        for first in range(len(head), len(tokens), stride):
            last = min(first + stride, len(tokens))  # this window predicts tokens[first:last]
            begin = max(0, last - 1 - sequence_length)
            targets = tokens[begin + 1 : last].copy()
            targets[: first - begin - 1] = _IGNORED
            windows.append(_Window(tokens[begin : last - 1], targets))
    return windows
