"""Learning-rate schedules: a factor between 0 and 1 as a function of a run's progress."""

from __future__ import annotations

import math

from mainspring.train.recipe import ScheduleSection


def progress(step: int, max_steps: int, elapsed: float, max_seconds: float | None) -> float:
    """How much of the run is behind, 0 to 1: by steps or, with a time budget, by whichever ends first.

    step: steps that are done; elapsed: seconds since the start. Without a time budget the result depends on
    the step alone, which is what bit-for-bit resuming needs.
    """
    by_steps = step / max_steps
    by_time = elapsed / max_seconds if max_seconds is not None else 0.0
    return min(max(by_steps, by_time), 1.0)


def learning_rate_factor(schedule: ScheduleSection, done: float) -> float:
    """The factor at progress `done`.

    Warm-up is linear from 0 to 1 over the first `warmup_fraction`. Then `cosine` (Loshchilov and Hutter,
    arXiv 1608.03983, eq. 5) falls to `final_factor`; `wsd` (warm-up, stable, decay; Hu et al., arXiv
    2404.06395) stays at 1 and falls linearly over the last `decay_fraction`; `constant` stays at 1.
    """
    warmup = schedule.warmup_fraction
    if done < warmup:
        return done / warmup
    low = schedule.final_factor
    if schedule.kind == "cosine":
        after = (done - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * after))
    if schedule.kind == "wsd":
        decay = schedule.decay_fraction
        left = 1.0 - done
        return 1.0 if left >= decay else low + (1.0 - low) * left / decay
    return 1.0
