"""The pipeline of a server: the lexical index follows the store when an index run has changed it."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

from mainspring.rag.assembly import open_lexical
from mainspring.rag.pipeline import Pipeline


class LivePipeline:
    """Hands out a pipeline over the store's present version. Thread-safe."""

    def __init__(self, directory: Path, pipeline: Pipeline) -> None:
        self._directory = directory
        self._pipeline = pipeline
        self._lock = threading.Lock()

    def current(self) -> Pipeline:
        """The pipeline; its lexical index is opened anew if the store has another version than it."""
        parts = self._pipeline.parts
        if parts.store.version() == parts.lexical.version:
            return self._pipeline
        with self._lock:
            parts = self._pipeline.parts
            if parts.store.version() != parts.lexical.version:
                lexical = open_lexical(self._directory, self._pipeline.strategy, parts.store)
                parts = dataclasses.replace(parts, lexical=lexical)
                self._pipeline = dataclasses.replace(self._pipeline, parts=parts)
            return self._pipeline
