"""Runs of post-training from a recipe on a random model of bytes, for tests of runs on one device and over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mainspring.model.checkpoint import save_model
from mainspring.model.initialise import create_model
from mainspring.rl.recipe import RlRecipe, parse_rl_recipe
from support.byte_tokenizer import byte_tokenizer
from train.models import tiny_config

RECIPE = """
algorithm = "{algorithm}"
output = "{folder}/out"
[model]
path = "{folder}/model"
dtype = "float32"
[data]
train = "{folder}/train.jsonl"
validation = "{folder}/held_out.jsonl"
stop = ["\\n"]
[reward]
function = "rl.reward_functions:share_of_digits"
[rollouts]
prompts_per_step = 3
group_size = 3
max_tokens = 6
[optimizer]
lr = 1e-3
[grpo]
max_steps = 4
mini_batches = 2
[vapo]
max_steps = 4
warmup_steps = 1
[sft]
max_steps = 4
prompts_per_step = 3
[dpo]
max_steps = 4
prompts_per_step = 3
[checkpoint]
every = 2
keep = 3
"""


def prepare(folder: Path) -> Path:
    """A random model of bytes, and files of prompts, answers and pairs."""
    config = tiny_config(vocab_size=257, max_position_embeddings=64, eos_token_id=256, num_attention_heads=2)
    save_model(create_model(config, seed=1), folder / "model", tokenizer=byte_tokenizer())
    for name, numbers in (("train", range(8)), ("held_out", range(8, 11))):
        rows = [
            {
                "prompt": f"{i}+{i}=",
                "reference": str(2 * i),
                "answer": str(2 * i),
                "chosen": "a",
                "rejected": "b",
            }
            for i in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, algorithm: str = "grpo", *overrides: str) -> RlRecipe:
    return parse_rl_recipe(RECIPE.format(folder=folder, algorithm=algorithm), overrides=overrides)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
