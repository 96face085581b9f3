"""A step cut into pieces that follow one another through the stages of a pipeline, so that these work side by side.

A sequence may be cut, too: a stage takes the pieces in order, so a later piece finds the keys of the one before. In
lockstep no bit depends on the cuts.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate

from mainspring.ops.batch import TokenBatch
from mainspring.parallel.mesh import even_bounds

_PIECES_A_STAGE = 2


def piece_bounds(num_tokens: int, stages: int, least: int) -> list[int]:
    """Where the pieces of a step begin, and its end.

    least: tokens below which a piece is not worth its launches (and, on a GPU, another reading of the weights).
    """
    pieces = max(1, min(_PIECES_A_STAGE * stages, num_tokens // least)) if stages > 1 else 1
    return even_bounds(num_tokens, pieces)


def cut_batch(batch: TokenBatch, begin: int, end: int) -> TokenBatch:
    """Tokens begin .. end - 1 of a paged batch, whose earlier tokens are in the cache by then."""
    if begin == 0 and end == batch.num_tokens:
        return batch
    assert batch.slots is not None and batch.block_tables is not None  # a paged batch has both
    bounds = list(accumulate(batch.lengths, initial=0))
    first = next(s for s in range(len(batch.lengths)) if bounds[s + 1] > begin)
    last = next(s for s in range(first, len(batch.lengths)) if bounds[s + 1] >= end)
    chosen = slice(first, last + 1)
    left_out = bounds[last + 1] - end  # of the last sequence
    lengths = [min(bounds[s + 1], end) - max(bounds[s], begin) for s in range(first, last + 1)]
    contexts = [*batch.contexts[first:last], batch.contexts[last] - left_out]
    context_lens = batch.context_lens[chosen].clone()
    context_lens[-1] -= left_out
    return dataclasses.replace(
        batch,
        positions=batch.positions[begin:end],
        cu_seqlens=(batch.cu_seqlens[first : last + 2] - begin).clamp(0, end - begin),
        context_lens=context_lens,
        lengths=tuple(lengths),
        contexts=tuple(contexts),
        rope_lengths=batch.rope_lengths[chosen],
        slots=batch.slots[begin:end],
        block_tables=batch.block_tables[chosen],
    )
