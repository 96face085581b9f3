"""Results of stages by content address: what was computed once from the same inputs is never computed again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mainspring.formats.files import beside

Array = npt.NDArray[Any]


class StageCache:
    """Arrays in a directory, each under the hash of what made it. Several processes may share one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.hits = 0
        self.misses = 0

    def get(self, stage: str, inputs: object, compute: Callable[[], Array]) -> Array:
        """The array of `stage` on `inputs` (any JSON value), from the cache or computed and kept.

        A damaged file is computed again.
        """
        path = self._path(stage, inputs)
        found = self._read(path)
        if found is None:
            found = compute()
            self._keep(path, found)
        return found

    def get_many(self, stage: str, inputs: Sequence[object], compute: Callable[[list[int]], Array]) -> Array:
        """[N, ...]: `get_rows` where every row has the same shape."""
        rows = self.get_rows(stage, inputs, compute)
        return np.stack(rows) if rows else np.empty(0, np.float32)

    def get_rows(
        self, stage: str, inputs: Sequence[object], compute: Callable[[list[int]], Sequence[Array] | Array]
    ) -> list[Array]:
        """One array for each of `inputs`; `compute` gets the indices that the cache lacks, all at once."""
        paths = [self._path(stage, item) for item in inputs]
        rows = [self._read(path) for path in paths]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            for index, value in zip(missing, compute(missing), strict=True):
                rows[index] = np.asarray(value)
                self._keep(paths[index], np.asarray(value))
        return [row for row in rows if row is not None]

    def _path(self, stage: str, inputs: object) -> Path:
        address = hashlib.sha256(json.dumps([stage, inputs], sort_keys=True).encode()).hexdigest()
        return self._directory / address[:2] / f"{address}.npy"

    def _read(self, path: Path) -> Array | None:
        try:
            found: Array = np.load(path, allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            self.misses += 1
            return None
        self.hits += 1
        return found

    @staticmethod
    def _keep(path: Path, value: Array) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path)
        try:
            with open(partial, "wb") as file:
                np.save(file, value, allow_pickle=False)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
