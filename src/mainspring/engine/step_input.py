"""What the host tells the device of a step, packed into one array, so that one copy brings it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mainspring.engine.scheduler import ScheduledRequest

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step of T tokens of S sequences on the device; R rows are sampled from. All int64.

    Attributes:
        new_tokens: [3, *] seat, position and id of tokens that the device does not know yet.
        new_blocks: [3, *] seat, place in the sequence and block likewise.
        token_seats, positions: [T] of each token of the step.
        seats, contexts: [S] of each sequence: its seat, and how many keys it has after the step.
        boundaries: [S + 1] where the sequences begin in the step.
        sample_rows: [R] the tokens whose hidden states give the sampled tokens.
        sample_seats, sample_positions: [R] whose the sampled tokens are, and where they will stand.
    """

    new_tokens: Tensor
    new_blocks: Tensor
    token_seats: Tensor
    positions: Tensor
    seats: Tensor
    contexts: Tensor
    boundaries: Tensor
    sample_rows: Tensor
    sample_seats: Tensor
    sample_positions: Tensor


def send(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of their shapes on the device, by one copy that the host does not wait for.

    Pinned memory comes from PyTorch's own pool, which gives it out again when the copy has been made.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [array.size for array in arrays]
    pinned = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    np.concatenate([array.reshape(-1) for array in arrays], out=pinned.numpy())
    pieces = pinned.to(device, non_blocking=True).split(sizes)
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def build_input(scheduled: Sequence[ScheduledRequest], device: torch.device) -> StepInput:
    """Any mix of prompt chunks, decodes and drafts."""
    lengths = np.array([item.num_tokens for item in scheduled], dtype=np.int64)
    starts = np.array([item.start for item in scheduled], dtype=np.int64)
    seats = np.array([item.request.seat for item in scheduled], dtype=np.int64)
    boundaries = np.zeros(len(scheduled) + 1, dtype=np.int64)
    np.cumsum(lengths, out=boundaries[1:])
    positions = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1] - starts, lengths)
    # A sampling sequence's last 1 + drafts tokens give a row each.
    counts = np.array([1 + item.num_drafts if item.samples else 0 for item in scheduled], dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    ramp = np.arange(counts.sum()) - np.repeat(firsts, counts)
    sample_rows = ramp + np.repeat(boundaries[1:] - counts, counts)
    arrays = [
        _new_tokens(scheduled),
        _new_blocks(scheduled),
        np.repeat(seats, lengths),
        positions,
        seats,
        starts + lengths,
        boundaries,
        sample_rows,
        np.repeat(seats, counts),
        positions[sample_rows] + 1,
    ]
    return StepInput(*send(arrays, device))


def _new_tokens(scheduled: Sequence[ScheduledRequest]) -> Ints:
    pieces: list[tuple[int, int, list[int]]] = []  # seat, first position, ids
    for item in scheduled:
        request = item.request
        if not request.is_seated:
            pieces.append((request.seat, item.start, request.token_ids[item.start :]))
        if item.num_drafts:
            first = item.start + item.num_tokens - item.num_drafts
            pieces.append((request.seat, first, request.draft_token_ids[: item.num_drafts]))
    return _triples(pieces)


def _new_blocks(scheduled: Sequence[ScheduledRequest]) -> Ints:
    pieces: list[tuple[int, int, list[int]]] = []  # seat, first place, blocks
    for item in scheduled:
        table, done = item.request.block_table, item.request.num_blocks_uploaded
        if len(table) > done:
            pieces.append((item.request.seat, done, table[done:]))
    return _triples(pieces)


def _triples(pieces: Sequence[tuple[int, int, list[int]]]) -> Ints:
    """[3, N]: key, running index and value of each element of the pieces (key, first index, values)."""
    if not pieces:
        return np.zeros((3, 0), dtype=np.int64)
    counts = np.array([len(values) for _, _, values in pieces], dtype=np.int64)
    keys = np.array([key for key, _, _ in pieces], dtype=np.int64)
    firsts = np.array([first for _, first, _ in pieces], dtype=np.int64)
    total = int(counts.sum())
    index = np.arange(total) - np.repeat(np.cumsum(counts) - counts - firsts, counts)
    values = np.fromiter(chain.from_iterable(values for _, _, values in pieces), dtype=np.int64, count=total)
    return np.stack((np.repeat(keys, counts), index, values))
