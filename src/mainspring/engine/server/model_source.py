"""Finding the model that is to be served, and showing the work that the first start does for it."""

from __future__ import annotations

from mainspring.engine.server.reporter import Reporter
from mainspring.formats.named_models import ResolvedModel, ResolveProgress, resolve


def resolve_model(model: str, dtype: str | None, reporter: Reporter) -> ResolvedModel:
    """The model's directory; a GGUF file is verified and converted first, to float32 only if that is asked for.

    Raises: ModelNotFoundError, CheckpointError.
    """
    return resolve(model, dtype if dtype is not None else "bfloat16", _Shown(reporter))


class _Shown(ResolveProgress):
    """Passes the progress on, each kind of work as a step of its own."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._step: str | None = None

    def hashing(self, done_bytes: int, total_bytes: int) -> None:
        self._show("Verifying the model's file", done_bytes, total_bytes)

    def converting(self, done_bytes: int, total_bytes: int) -> None:
        self._show("Converting the weights (first start only)", done_bytes, total_bytes)

    def _show(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self._step = step
            self._reporter.step(step)
        self._reporter.progress(done, total)
