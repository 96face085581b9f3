"""From pairs to a reward model to a policy that it rewards, by recipes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mainspring.errors import RecipeError
from mainspring.model.checkpoint import save_model
from mainspring.rl.recipe import parse_rl_recipe
from mainspring.rl.run import RlRun
from mainspring.rl.value_model import ValueModel
from support.byte_tokenizer import byte_tokenizer
from train.models import tiny_model

COMMON = """
[model]
path = "{policy}"
dtype = "float32"
[data]
train = "{data}"
validation = "{data}"
stop = ["<end>"]
[optimizer]
lr = 1e-2
weight_decay = 0.0
"""


def _lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _records(path: Path, event: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["event"] == event]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    model = tiny_model(vocab_size=257, max_position_embeddings=64)
    save_model(model, tmp_path / "policy", tokenizer=byte_tokenizer())
    return tmp_path / "policy"


def _reward_recipe(tmp_path: Path, policy: Path, steps: int) -> str:
    pairs = [{"prompt": f"say {c}:", "chosen": "yes", "rejected": "no"} for c in "abcdefgh"]
    data = _lines(tmp_path / "pairs.jsonl", pairs)
    own = f"\n[reward_model]\nprompts_per_step = 4\nmax_steps = {steps}\n[checkpoint]\nevery = 10\nkeep = 9"
    top = f'algorithm = "reward_model"\noutput = "{tmp_path / "judge"}"'
    return top + COMMON.format(policy=policy, data=data) + own


def test_a_reward_model_is_trained_and_rewards_a_policy(tmp_path: Path, policy: Path) -> None:
    result = RlRun(parse_rl_recipe(_reward_recipe(tmp_path, policy, 20))).run()
    metrics = tmp_path / "judge" / "metrics.jsonl"
    first, last = (_records(metrics, "validation")[i] for i in (0, -1))
    assert first["loss"] == pytest.approx(0.693, abs=1e-3)
    assert last["loss"] < 0.1
    assert last["accuracy"] == 1.0
    judge = ValueModel.load(result.checkpoint)
    assert judge.task == "sequence"

    prompts = _lines(tmp_path / "prompts.jsonl", [{"prompt": f"say {c}:"} for c in "abcd"])
    recipe = (
        f'algorithm = "vapo"\noutput = "{tmp_path / "run"}"'
        + COMMON.format(policy=policy, data=prompts)
        + f"""
[reward]
model = "{result.checkpoint}"
[rollouts]
prompts_per_step = 2
group_size = 3
max_tokens = 4
[vapo]
max_steps = 3
warmup_steps = 1
right_from = 0.0
"""
    )
    end = RlRun(parse_rl_recipe(recipe)).run()
    steps = _records(tmp_path / "run" / "metrics.jsonl", "step")
    assert [step["max_delta"] for step in steps] == [0.0, 0.0, 0.0]
    assert steps[0]["loss"] is None  # value pretraining
    assert steps[2]["loss"] is not None
    groups = _records(tmp_path / "run" / "rollouts.jsonl", "group")
    rewards = [answer["reward"] for group in groups[:2] for answer in group["answers"]]
    assert steps[0]["reward"] == pytest.approx(sum(rewards) / 6, rel=1e-4)
    assert len(set(rewards)) == 6  # a number of its own for each answer
    assert all(answer["advantage"] is not None for group in groups for answer in group["answers"])
    assert ValueModel.load(end.checkpoint / "critic").task == "token"


def test_a_stopped_reward_run_resumes_to_the_bit(tmp_path: Path, policy: Path) -> None:
    whole = RlRun(parse_rl_recipe(_reward_recipe(tmp_path, policy, 20))).run()
    expected = ValueModel.load(whole.checkpoint)
    stopped = tmp_path / "judge" / "step-00000010"
    whole.checkpoint.rename(tmp_path / "whole")
    (tmp_path / "judge" / "latest").unlink(missing_ok=True)
    assert stopped.is_dir()
    again = RlRun(parse_rl_recipe(_reward_recipe(tmp_path, policy, 20)), resume=True).run()
    assert again.step == 20
    for (name, a), b in zip(
        expected.named_parameters(), ValueModel.load(again.checkpoint).parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_pairs_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"reward_model learns from data\.train"):
        parse_rl_recipe('algorithm = "reward_model"\n[data]\ngym_task = "chain_sum"')
