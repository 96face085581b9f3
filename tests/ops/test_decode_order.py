"""The order of a decode step's sequences: all of them, and the lanes of the kernel have more equal work than before."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainspring.ops.decode_order import KEY_CHUNK, decode_lanes, decode_order


def longest_lane(contexts: list[int], lanes: int) -> int:
    """Keys of the lane that has most, if chunks are handed out in turn."""
    work = [0] * lanes
    place = 0
    for context in contexts:
        for first in range(0, context, KEY_CHUNK):
            work[place % lanes] += min(KEY_CHUNK, context - first)
            place += 1
    return max(work)


@given(st.lists(st.integers(1, 5 * KEY_CHUNK), min_size=1, max_size=60), st.integers(1, 70))
def test_every_sequence_has_a_place(contexts: list[int], lanes: int) -> None:
    order = decode_order(np.array(contexts), lanes)
    assert sorted(order.tolist()) == list(range(len(contexts)))


def test_the_longest_chunk_of_a_round_stands_over_the_shortest_of_the_next() -> None:
    contexts = np.array([100, 600, 300, 500, 200, 400])
    assert contexts[decode_order(contexts, 2)].tolist() == [600, 500, 300, 400, 200, 100]
    # The longest one has three chunks: they are a round of their own.
    contexts = np.array([5, 2500, 4, 3, 2])
    assert contexts[decode_order(contexts, 3)].tolist() == [2500, 3, 4, 5, 2]


def test_lanes_wait_less_for_each_other() -> None:
    generator = np.random.default_rng(0)
    before, after, least = 0.0, 0.0, 0.0
    for _ in range(50):
        contexts = generator.integers(100, KEY_CHUNK, size=256)
        before += longest_lane(contexts.tolist(), 132)
        after += longest_lane(contexts[decode_order(contexts, 132)].tolist(), 132)
        least += contexts.sum() / 132
    assert least < after < 1.1 * least < 1.5 * least < before


def test_a_cpu_has_no_lanes() -> None:
    assert decode_lanes(8, torch.device("cpu")) == 0
