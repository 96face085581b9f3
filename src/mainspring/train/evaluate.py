"""Bits per byte on the held-out tails."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mainspring.model.decoder import Decoder
from mainspring.ops import TokenBatch
from mainspring.train.shards import TokenShard

_IGNORED = -100


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


@torch.no_grad()
def evaluate(
    model: Decoder,
    train: TokenShard,
    holdout: TokenShard,
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
    batch: list[_Window] = []
    room = tokens_per_batch
    for window in _windows(train, holdout, sequence_length, stride):
        if batch and len(window.tokens) > room:
            total += _negative_log_likelihood(model, batch)
            batch, room = [], tokens_per_batch
        batch.append(window)
        room -= len(window.tokens)
        count += int((window.targets != _IGNORED).sum())
    if batch:
        total += _negative_log_likelihood(model, batch)
    return Evaluation(total / math.log(2) / holdout_bytes, total / max(count, 1), count, holdout_bytes)


def _windows(train: TokenShard, holdout: TokenShard, sequence_length: int, stride: int) -> list[_Window]:
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


def _negative_log_likelihood(model: Decoder, windows: list[_Window]) -> float:
    """The sum over all targets, in nats."""
    device = model.device
    tokens = torch.from_numpy(np.concatenate([w.tokens for w in windows])).to(device)
    targets = torch.from_numpy(np.concatenate([w.targets for w in windows])).to(device)
    mean = model.loss(tokens, TokenBatch.packed([len(w.tokens) for w in windows], device), targets)
    return float(mean) * int((targets != _IGNORED).sum())
