"""Bits per byte count every held-out token once, with the context that the document gives."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mainspring.model.decoder import Decoder
from mainspring.ops import TokenBatch
from mainspring.train.evaluate import evaluate
from mainspring.train.recipe import OptimizerSection
from mainspring.train.runner import SingleDevice
from mainspring.train.shards import ShardWriter, TokenShard
from train.models import tiny_model


def _shards(directory: Path, heads: list[int], tails: list[int]) -> tuple[TokenShard, TokenShard]:
    random = np.random.default_rng(0)
    shards = []
    for name, lengths in (("train", heads), ("holdout", tails)):
        with ShardWriter(directory / name, 61) as writer:
            for length in lengths:
                writer.add(random.integers(0, 61, length))
        shards.append(TokenShard(directory / name))
    return shards[0], shards[1]


def _one_by_one(
    model: Decoder, train: TokenShard, holdout: TokenShard, sequence_length: int, stride: int
) -> float:
    """Every held-out token on its own, in nats: its context is what its window holds before it."""
    total = 0.0
    for i in range(holdout.num_documents):
        head, tail = train.document(i).tolist(), holdout.document(i).tolist()
        text = head + tail
        for j in range(len(tail)):
            last = min(j // stride * stride + stride, len(tail)) + len(head)
            begin = max(0, last - 1 - sequence_length, len(head) - sequence_length)
            target = len(head) + j
            context = torch.tensor(text[begin:target])
            hidden = model(context, TokenBatch.packed([len(context)]))
            total -= float(model.logits(hidden[-1:]).log_softmax(-1)[0, text[target]])
    return total


@pytest.mark.parametrize(("sequence_length", "stride"), [(8, 8), (8, 4), (8, 1), (32, 5)])
def test_every_token_is_predicted_once_in_its_context(
    tmp_path: Path, sequence_length: int, stride: int
) -> None:
    model = tiny_model().eval()
    train, holdout = _shards(tmp_path, [20, 1, 3, 9], [30, 11, 0, 1])
    with torch.no_grad():
        result = evaluate(
            SingleDevice(model, OptimizerSection()),
            train,
            holdout,
            100,
            sequence_length=sequence_length,
            stride=stride,
            tokens_per_batch=40,
        )
        expected = _one_by_one(model, train, holdout, sequence_length, stride)
    assert result.tokens == 42
    assert result.num_bytes == 100
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 100, rel=1e-5)
    assert result.loss == pytest.approx(expected / 42, rel=1e-5)
