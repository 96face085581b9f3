"""Sources blended by weight: of an epoch's tokens each source gives its share, however large it is.

A source of n tokens with share s goes through s · N / n passes an epoch, where N is the tokens of all sources: a small
one with a large share several times, a large one in part. Each pass cuts and shuffles the source anew; epoch e takes
passes e · r to (e + 1) · r of a source's endless sequence of passes, so that none of its windows comes again before
all others have been. The windows of all sources are then shuffled together.

Everything is a function of (seed, epoch), as in `packing.py`: nothing else has to be kept to resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mainspring.errors import RecipeError
from mainspring.train.packing import cut_windows, targets_of


@dataclass(frozen=True)
class Source:
    """Documents first to last (exclusive) of the corpus. weight: the share of tokens, relative to the others'."""

    name: str
    first: int
    last: int
    weight: float


def blended_windows(
    offsets: NDArray[np.int64], sources: Sequence[Source], sequence_length: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """One epoch's windows, shuffled, [W, 2]: (first token, length). offsets: of all documents, [D + 1].

    Raises RecipeError for a source that has nothing to predict.
    """
    sizes = [targets_of(offsets[source.first : source.last + 1]) for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        if size == 0:
            raise RecipeError(f"{source.name}: no document has two tokens; give it no weight, or other texts")
    total, weights = sum(sizes), sum(source.weight for source in sources)
    windows = []
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        passes = source.weight / weights * total / size
        begin, end = epoch * passes, (epoch + 1) * passes
        own = offsets[source.first : source.last + 1]
        for each in range(math.floor(begin), math.ceil(end)):
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number, each))))
            cut = cut_windows(own, sequence_length, random)
            cut = cut[random.permutation(len(cut))]
            windows.append(_part(cut, max(begin - each, 0.0), min(end - each, 1.0)))
    together = np.concatenate(windows)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return together[random.permutation(len(together))]


def _part(windows: NDArray[np.int64], begin: float, end: float) -> NDArray[np.int64]:
    """The windows that begin in this part, 0 to 1, of their tokens."""
    ends = np.cumsum(windows[:, 1])
    starts, total = ends - windows[:, 1], int(ends[-1])
    first, last = np.searchsorted(starts, [begin * total, end * total], side="left")
    part: NDArray[np.int64] = windows[first:last]
    return part
