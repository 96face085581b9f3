"""Putting found passages into a better order: the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Reranker(Protocol):
    """Scores how well passages answer a query."""

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N]: higher is better; comparable between passages of one query."""
        ...
