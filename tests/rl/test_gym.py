"""Tasks of reasoning-gym: prompts are a function of the seed, and the reward is the task's own verifier."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym", reason="the optional extra 'rl'")

from mainspring.errors import ConfigError
from mainspring.rl.gym import gym_prompts, gym_score, gym_solved
from mainspring.rl.rewards import Completion, RewardWorker

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def _encode(text: str) -> list[int]:
    return list(text.encode())


def test_prompts_are_a_function_of_the_seed_and_shots_of_their_own() -> None:
    first, again = (gym_prompts("chain_sum", 5, _encode, seed=1, settings=SUMS) for _ in range(2))
    assert first == again
    assert gym_prompts("chain_sum", 5, _encode, seed=77, settings=SUMS) != first
    shown = gym_prompts("chain_sum", 5, _encode, seed=1, shots=2, shots_seed=500, settings=SUMS)
    for plain, prompt in zip(first, shown, strict=True):
        assert prompt.text.count("Q: ") == 3
        assert prompt.text.endswith(f"Q: {plain.text}\nA:")
        assert prompt.text[:40] == shown[0].text[:40]
        assert prompt.tokens == tuple(prompt.text.encode())


def test_an_answer_is_verified_from_the_texts_alone_in_another_process() -> None:
    prompts = gym_prompts("chain_sum", 4, _encode, seed=3, settings=SUMS)
    right = [json.loads(p.reference)["entry"]["answer"] for p in prompts]
    completions = [
        Completion(p.text, answer, p.reference)
        for p, truth in zip(prompts, right, strict=True)
        for answer in (f" {truth}\n", f"it is {truth}", "none")
    ]
    with RewardWorker(gym_solved, timeout=60) as worker:
        assert worker.score(completions) == [1.0, 0.0, 0.0] * 4
    partial = gym_score(prompts[0].text, f"it is {right[0]}", prompts[0].reference)
    assert 0 < partial < 1, "reasoning-gym gives partial credit; gym_solved does not"


def test_the_verifier_needs_no_pytorch() -> None:
    code = "import sys, mainspring.rl.gym; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_task_or_setting_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="'chain_summ'"):
        gym_prompts("chain_summ", 3, _encode)
    with pytest.raises(ConfigError, match="min_term"):
        gym_prompts("chain_sum", 3, _encode, settings={"min_term": 2})
