"""In what order a decode step's sequences give the multiprocessors equal work.

The decode kernel (csrc/cuda/paged_attention.cu) hands out chunks of keys in turn: with L lanes (warps, for all key
heads of a sequence together) the chunks i, i + L, i + 2 L ... are one lane's. Lengths that stand as requests came leave
some lanes with much more than others, and the step waits for them. A row's bits do not depend on where it stands.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mainspring.ops.triton.support import multiprocessors

KEY_CHUNK = 1024  # as in csrc/cuda/canonical.cuh
_WARPS = 8  # of a multiprocessor, as in csrc/cuda/paged_attention.cu

Ints = npt.NDArray[np.int64]


def decode_lanes(num_kv_heads: int, device: torch.device) -> int:
    """How many chunks of keys, all heads, are read side by side; 0 where order does not matter (not on a GPU)."""
    return multiprocessors(device) * _WARPS // num_kv_heads if device.type == "cuda" else 0


def decode_order(contexts: Ints, lanes: int) -> Ints:
    """Indices of the sequences: the longest first, every second round of all lanes backwards, so that the lane with the
    longest chunk of one round has the shortest of the next.

    contexts: [S] int64, keys of each sequence -> [S] int64, a permutation.
    """
    order = np.argsort(-contexts, kind="stable")
    chunks = -(-contexts[order] // KEY_CHUNK)
    rounds = (np.cumsum(chunks) - chunks) // lanes
    backwards = rounds % 2 == 1
    # Within a round places stand still or are mirrored; rounds stay in order.
    places = np.arange(len(order))
    first, last = np.searchsorted(rounds, rounds, "left"), np.searchsorted(rounds, rounds, "right") - 1
    return order[np.where(backwards, first + last - places, places)]
