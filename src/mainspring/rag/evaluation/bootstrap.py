"""How sure a mean is: percentile bootstrap over questions (Efron, 1979), paired where two systems are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mainspring.errors import ConfigError

_BLOCK = 256  # resamples drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds between which it lies with the given confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of one value a question. Raises ConfigError for no values or a confidence outside (0, 1)."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0 or not 0 < confidence < 1:
        raise ConfigError(
            f"a bootstrap needs values and a confidence in (0, 1), got {len(data)} and {confidence}"
        )
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            data[generator.integers(len(data), size=(min(_BLOCK, resamples - first), len(data)))].mean(1)
            for first in range(0, resamples, _BLOCK)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high))


def paired_difference(
    better: Sequence[float],
    worse: Sequence[float],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of better - worse, question by question. Raises ConfigError if they have not the same questions."""
    if len(better) != len(worse):
        raise ConfigError(f"a paired comparison needs the same questions, got {len(better)} and {len(worse)}")
    return bootstrap(
        np.subtract(better, worse).tolist(), resamples=resamples, confidence=confidence, seed=seed
    )
