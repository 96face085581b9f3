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
class StepArrays:
    """A step of T tokens of S sequences; R rows are sampled from. All int64, on the host.

    Attributes:
        new_tokens: [3, *] seat, position and id of tokens that the device does not know yet.
        new_blocks: [3, *] seat, place in the sequence and block likewise.
        token_seats, positions: [T] of each token of the step.
        seats, contexts: [S] of each sequence: its seat, and how many keys it has after the step.
        boundaries: [S + 1] where the sequences begin in the step.
        sample_rows: [R] the tokens whose hidden states give the sampled tokens.
        sample_seats, sample_positions: [R] whose the sampled tokens are, and where they will stand.
    """

    new_tokens: Ints
    new_blocks: Ints
    token_seats: Ints
    positions: Ints
    seats: Ints
    contexts: Ints
    boundaries: Ints
    sample_rows: Ints
    sample_seats: Ints
    sample_positions: Ints

    def news(self) -> list[Ints]:
        """What is to be entered into the tables before the step."""
        return [self.new_tokens, self.new_blocks]

    def rest(self) -> list[Ints]:
        """What the step itself is made of."""
        return [
            self.token_seats, self.positions, self.seats, self.contexts, self.boundaries, self.sample_rows,
            self.sample_seats, self.sample_positions,
        ]  # fmt: skip

    def padded(self, num_tokens: int, num_rows: int, dummy: int) -> list[Ints]:
        """`rest` with T = num_tokens and S = R = num_rows: further tokens are the dummy seat's, in no sequence, and
        further sequences are empty."""
        more_tokens, more = num_tokens - len(self.positions), num_rows - len(self.seats)
        more_samples = num_rows - len(self.sample_rows)
        last = int(self.boundaries[-1])
        fills = (
            (more_tokens, dummy), (more_tokens, 0), (more, dummy), (more, 0), (more, last), (more_samples, 0),
            (more_samples, dummy), (more_samples, 0),
        )  # fmt: skip
        return [
            np.concatenate([array, np.full(count, value, dtype=np.int64)])
            for array, (count, value) in zip(self.rest(), fills, strict=True)
        ]


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


def build_step(scheduled: Sequence[ScheduledRequest]) -> StepArrays:
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
    return StepArrays(
        new_tokens=_new_tokens(scheduled),
        new_blocks=_new_blocks(scheduled),
        token_seats=np.repeat(seats, lengths),
        positions=positions,
        seats=seats,
        contexts=starts + lengths,
        boundaries=boundaries,
        sample_rows=sample_rows,
        sample_seats=np.repeat(seats, counts),
        sample_positions=positions[sample_rows] + 1,
    )


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
