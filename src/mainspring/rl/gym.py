"""Tasks of reasoning-gym (the optional extra `rl`): prompts without end, and the verifier that belongs to each.

A prompt's reference carries the whole entry, so that the reward worker, another process, can verify an answer from the
texts alone. No PyTorch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mainspring.errors import ConfigError
from mainspring.rl.prompts import Prompt

Encode = Callable[[str], Sequence[int]]


def gym_prompts(
    task: str,
    count: int,
    encode: Encode,
    *,
    seed: int = 0,
    shots: int = 0,
    shots_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """`count` entries of a task, a function of the seed.

    settings: of the task, as reasoning-gym names them ({"min_terms": 2}). shots: so many solved entries stand before
    each question, as "Q: ... A: ...", the same of shots_seed everywhere; without any the prompt is the question itself.
    Raises ConfigError.
    """
    solved = _entries(task, shots, shots_seed, settings or {})
    before = "".join(f"Q: {entry['question']}\nA: {entry['answer']}\n\n" for entry in solved)
    prompts = []
    for entry in _entries(task, count, seed, settings or {}):
        text = f"{before}Q: {entry['question']}\nA:" if shots else entry["question"]
        prompts.append(Prompt(tuple(encode(text)), text, json.dumps({"task": task, "entry": entry})))
    return prompts


def gym_score(prompt: str, answer: str, reference: str) -> float:
    """The task's own verifier on the answer without white space around it: 0 to 1, partial credit included."""
    record = json.loads(reference)
    return float(_verifier(record["task"])(answer.strip(), record["entry"]))


def gym_solved(prompt: str, answer: str, reference: str) -> float:
    """1.0 where `gym_score` gives full marks, else 0.0."""
    return float(gym_score(prompt, answer, reference) >= 0.99)


def _entries(task: str, count: int, seed: int, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    if count == 0:
        return []
    try:
        dataset = _gym().create_dataset(task, size=count, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym cannot make the task {task!r} with {dict(settings)}: {error}"
        ) from error
    return [dataset[i] for i in range(count)]


@cache
def _verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    verifier: Callable[[str, dict[str, Any]], float] = _gym().get_score_answer_fn(task)
    return verifier


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("tasks of reasoning-gym need the package: pip install 'mainspring[rl]'") from error
    return reasoning_gym
