"""When to say that the documents do not answer: a threshold on the best passage's score, chosen on held-out questions.

The questions whose gold passage was taken out of the corpus are those that the documents do not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mainspring.errors import ConfigError


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it does on the questions that chose it.

    `answered` is the share of answerable questions at or above it, `abstained` that of unanswerable ones below.
    """

    threshold: float
    answered: float
    abstained: float

    @property
    def balanced_accuracy(self) -> float:
        """The mean of both shares."""
        return (self.answered + self.abstained) / 2


def calibrate(answerable: Sequence[float], unanswerable: Sequence[float]) -> Calibration:
    """The threshold of highest balanced accuracy; among equals the middle of the widest gap.

    Takes each question's best score. Raises ConfigError if either kind is missing.
    """
    if not answerable or not unanswerable:
        raise ConfigError(
            f"calibration needs questions of both kinds, got {len(answerable)} answerable, {len(unanswerable)} not"
        )
    scores = np.unique(np.concatenate([answerable, unanswerable]))
    middles = (scores[1:] + scores[:-1]) / 2
    candidates = np.concatenate([[scores[0] - 1], middles, [scores[-1] + 1]])
    gaps = np.concatenate([[0.0], scores[1:] - scores[:-1], [0.0]])
    quality = [evaluate(t, answerable, unanswerable).balanced_accuracy for t in candidates]
    best = max(range(len(candidates)), key=lambda i: (round(quality[i], 12), gaps[i]))
    return evaluate(float(candidates[best]), answerable, unanswerable)


def evaluate(threshold: float, answerable: Sequence[float], unanswerable: Sequence[float]) -> Calibration:
    """What a threshold does on (other) questions."""
    answered = float(np.mean(np.asarray(answerable) >= threshold))
    abstained = float(np.mean(np.asarray(unanswerable) < threshold))
    return Calibration(threshold, answered, abstained)
