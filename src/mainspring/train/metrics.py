"""What a run reports: JSON lines in a file, a live line on the terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from mainspring.formats.files import write_file


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; means are over the steps since the line before."""

    step: int
    epoch: float
    tokens: int
    loss: float
    """Mean negative log-likelihood of a training token, in nats."""
    lr_factor: float
    grad_norm: float
    """Of the last step, before clipping."""
    tokens_per_second: float
    mfu: float
    elapsed: float
    eta: float
    """Seconds of training that are left."""
    expert_imbalance: float | None = None
    """Of the last step: the busiest expert's load over the mean, in the worst layer; null where it is not known."""
    experts_idle: float | None = None
    """Of the last step: experts that were given nothing, over all, in the worst layer."""
    slots_dropped: float | None = None
    """Of the last step: slots beyond an expert's capacity, over all."""


class MetricsFile:
    """metrics.jsonl of a run. Each line is a JSON object with an `event`: "step", "evaluation", "checkpoint", ..."""

    def __init__(self, path: Path, resume_at: int | None) -> None:
        """Starts a new file or, when resuming, drops what was logged after step `resume_at` (or half-written)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(path, resume_at) if resume_at is not None and path.exists() else []
        write_file(path, "".join(kept).encode())
        self._stream = path.open("a", encoding="utf-8")

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if line.endswith("\n") and record.get("step", 0) <= step:
            kept.append(line)
    return kept


class Progress:
    """The live line: rewritten in place on a terminal, one line a report elsewhere. A silent one says nothing."""

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False) -> None:
        self._stream = io.StringIO() if silent else stream or sys.stderr
        self._live = self._stream.isatty()
        self._open = False

    def show(self, metrics: StepMetrics, max_steps: int) -> None:
        """Writes the line for one StepMetrics."""
        line = (
            f"step {metrics.step}/{max_steps}  epoch {metrics.epoch:.2f}  loss {metrics.loss:.4f}  "
            f"{metrics.tokens_per_second:,.0f} tokens/s  MFU {metrics.mfu:.1%}  ETA {_clock(metrics.eta)}"
        )
        if self._live:
            self._stream.write("\r\x1b[2K" + line)
            self._open = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line of its own, after the live one."""
        self._stream.write(("\n" if self._open else "") + text + "\n")
        self._stream.flush()
        self._open = False


def as_record(metrics: StepMetrics) -> dict[str, Any]:
    """The metrics as a JSON-able dictionary."""
    return asdict(metrics)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
