"""What a run writes beside its checkpoints: metrics.jsonl, and every group in rollouts.jsonl (`mainspring rl view`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mainspring.rl.prompts import Prompt
from mainspring.rl.trajectories import Group
from mainspring.train.metrics import MetricsFile


class RunLog:
    """A rank's: the first writes metrics.jsonl, and rollouts.jsonl; another its groups in rollouts-RANK.jsonl."""

    def __init__(
        self,
        output: Path,
        rank: int,
        resume_at: int | None,
        *,
        groups: bool,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """resume_at: a step, after which what was logged is dropped; None begins anew."""
        self._decode = decode
        name = f"rollouts-{rank}.jsonl" if rank else "rollouts.jsonl"
        self._metrics = MetricsFile(output / "metrics.jsonl", resume_at) if not rank else None
        self._groups = MetricsFile(output / name, resume_at) if groups else None

    def record(self, event: str, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(event, values)

    def groups(
        self, step: int, prompts: Sequence[Prompt], groups: Sequence[Group], advantages: Sequence[float]
    ) -> None:
        """A line for each group; advantages: of each answer, in their order."""
        if self._groups is None:
            return
        left = iter(advantages)
        for group in groups:
            prompt = prompts[group[0].prompt]
            answers = [
                {
                    "text": self._decode(t.tokens[len(prompt.tokens) :]),
                    "reward": t.reward,
                    "advantage": next(left),
                    "tokens": t.num_written,
                    "finished": t.finished,
                    "versions": [t.versions[0], t.versions[-1]],
                }
                for t in group
            ]
            record = {"step": step, "prompt": prompt.text, "reference": prompt.reference}
            self._groups.write("group", {**record, "answers": answers})

    def close(self) -> None:
        for file in (self._metrics, self._groups):
            if file is not None:
                file.close()


def flat(metrics: object) -> dict[str, Any]:
    """Plain values by name, nested ones beside the others; what is not a number is null, as JSON knows no nan."""
    record: dict[str, Any] = {}
    for entry in fields(metrics):  # type: ignore[arg-type]  # one of the dataclasses of `Metrics`
        value = getattr(metrics, entry.name)
        if entry.name in ("groups", "advantages"):
            continue
        if hasattr(value, "__dataclass_fields__"):
            record |= flat(value)
        else:
            record[entry.name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return record


def rate(tokens: int, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)
