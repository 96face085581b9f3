"""Sampling: one pass over the logits, the floors of truncation, and penalties, beside torch's ways to the same draw."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernel_groups.timing import ROTATED_BYTES, Row, row
from mainspring.ops.sampling_tensors import SamplingTensors
from mainspring.ops.triton.adjust_logits import adjust_logits
from mainspring.ops.triton.sample import sample

VOCAB = 151936
TOP_K, TOP_P = 20, 0.95


def sample_rows() -> Iterator[Row]:
    for rows in (1, 64, 256):
        yield from _of(rows)


def _of(rows: int) -> Iterator[Row]:
    sets = [_logits(rows) for _ in range(max(2, min(40, ROTATED_BYTES // (rows * VOCAB * 4) + 1)))]
    seats = torch.arange(rows, device="cuda")
    amount = rows * VOCAB * 4 / 1e9
    plain, truncated = _params(rows), _params(rows)
    truncated.top_k.fill_(TOP_K)
    truncated.top_p.fill_(TOP_P)
    plain.presence.fill_(0.5)
    greedy = SamplingTensors.allocate(rows, "cuda")
    history = torch.zeros(rows, VOCAB, dtype=torch.int32, device="cuda")
    yield row(
        "sample", f"temperature {rows}x{VOCAB}", amount, "GB",
        [lambda z=z: sample(z, plain, seats, seats, False) for z in sets],
        [lambda z=z: _race(torch.softmax(z / 0.6, -1)) for z in sets], "torch softmax and exponential race",
    )  # fmt: skip
    yield row(
        "sample", f"greedy, against argmax {rows}x{VOCAB}", amount, "GB",
        [lambda z=z: sample(z, greedy, seats, seats, False) for z in sets],
        [lambda z=z: z.argmax(-1) for z in sets], "torch argmax",
    )  # fmt: skip
    yield row(
        "sample", f"top_k {TOP_K}, top_p {TOP_P} {rows}x{VOCAB}", amount, "GB",
        [lambda z=z: sample(z, truncated, seats, seats, True) for z in sets],
        [lambda z=z: _race(_truncated(z / 0.6)) for z in sets[:4]], "torch by sort",
    )  # fmt: skip
    yield row(
        "sample", f"penalties {rows}x{VOCAB}", 3 * amount, "GB",
        [lambda z=z: adjust_logits(z, plain, seats, history, None, None) for z in sets],
    )  # fmt: skip


def _logits(rows: int) -> Tensor:
    """Like a language model's: most tokens far below the likeliest, some thousands in between."""
    logits = torch.randn(rows, VOCAB, device="cuda") * 2.5 - 8
    logits[:, :2000] += 6 * torch.rand(rows, 2000, device="cuda")
    logits[:, 7] += 12
    return logits[:, torch.randperm(VOCAB, device="cuda")].contiguous()


def _params(rows: int) -> SamplingTensors:
    params = SamplingTensors.allocate(rows, "cuda")
    params.key.copy_(torch.randint(-(2**62), 2**62, (rows,), device="cuda"))
    params.temperature.fill_(0.6)
    return params


def _race(probabilities: Tensor) -> Tensor:
    """A draw from each row: the first of exponential clocks to ring."""
    return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)


def _truncated(logits: Tensor) -> Tensor:
    """Probabilities after top-k, then top-p, as it is mostly written: over sorted logits."""
    ordered, index = logits.sort(-1)
    ordered.masked_fill_(ordered < ordered[:, -TOP_K, None], -torch.inf)
    ordered.masked_fill_(ordered.softmax(-1).cumsum(-1) <= 1 - TOP_P, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, index, ordered).softmax(-1)
