"""Jobs of the pool: post-training from a recipe, on every rank of the group."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mainspring.rl.run import RlRun
from mainspring.train.make_runner import Ranks
from mainspring.train.metrics import Progress
from rl.small_runs import recipe


def run(
    folder: str, algorithm: str, changes: list[str], resume: bool = False, stop_after: int | None = None
) -> tuple[int, bool, float | None]:
    """(the last step, whether it was interrupted, the last validation). stop_after: as a signal would."""
    settings = recipe(Path(folder), algorithm, *changes)
    one = RlRun(settings, resume=resume, show=Progress(silent=True), ranks=Ranks.present())
    if stop_after is not None:
        steps = one._steps
        one._steps = lambda: islice(steps(), stop_after)
    result = one.run()
    return result.step, result.interrupted, result.validation
