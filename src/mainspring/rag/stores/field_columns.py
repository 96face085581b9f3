"""The filterable fields of many chunks as columns: a filter over 100,000 of them is a look at the distinct values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mainspring.rag.stores.store import FIELDS, Filter


class FieldColumns:
    """For N chunks the fields of `FIELDS`: each column holds its distinct values and an index into them per chunk."""

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        """`columns`: for each of FIELDS the values of all chunks, in their order."""
        self._size = len(columns[0])
        self._values: dict[str, list[str]] = {}
        self._codes: dict[str, npt.NDArray[np.int32]] = {}
        for field, column in zip(FIELDS, columns, strict=True):
            known: dict[str, int] = {}
            codes = (known.setdefault(value, len(known)) for value in column)
            self._codes[field] = np.fromiter(codes, np.int32, self._size)
            self._values[field] = list(known)

    def __len__(self) -> int:
        return self._size

    def allowed(self, where: Filter) -> npt.NDArray[np.bool_] | None:
        """[N]: which chunks fulfil every condition; None where there is no condition."""
        if not where:
            return None
        mask = np.ones(self._size, dtype=np.bool_)
        for condition in where:
            values = self._values[condition.field]
            fits = [
                v.startswith(condition.value) if condition.prefix else v == condition.value for v in values
            ]
            if values:
                mask &= np.array(fits)[self._codes[condition.field]]
        return mask

    def rows(self) -> list[list[str]]:
        """[N][len(FIELDS)]: the values chunk by chunk, as they are written to a file."""
        columns = [[self._values[f][code] for code in self._codes[f].tolist()] for f in FIELDS]
        return [list(row) for row in zip(*columns, strict=True)]
