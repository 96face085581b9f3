"""Runs on sorting long enough to show that an algorithm learns: a partly trained model, and how it is trained on.

Slow tests and `benchmarks/rl_sorting.py`, `benchmarks/rl_ablation.py` share them.
"""

from __future__ import annotations

from collections import deque

from mainspring.model.decoder import Decoder
from mainspring.rl.critic import Critic
from mainspring.rl.rollouts import Rollouts, RolloutSettings
from mainspring.rl.samples import Sample
from mainspring.rl.sft import SftSettings, sft
from mainspring.rl.value_model import ValueModel
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import sorting

LEAST, MOST = 4, 7  # digits of a prompt
HELD_OUT = sorting.prompts(200, 99, least=LEAST, most=MOST)
WARM = ScheduleSection(kind="constant", warmup_fraction=0.05)


def partly_trained(steps: int = 120, seed: int = 0) -> Decoder:
    """107,648 parameters after so many steps of SFT on 32 samples each: it sorts a quarter of the time."""
    model = sorting.model(
        "lockstep",
        seed,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_key_value_heads=4,
        head_dim=16,
    )
    prompts = sorting.prompts(32 * steps, 7 + seed, least=LEAST, most=MOST)
    samples = [Sample.answer(p.tokens, [*sorting.encode(p.reference), sorting.END]) for p in prompts]
    settings = SftSettings(32, max_steps=steps, schedule=WARM, seed=seed)
    deque(sft(model, Optimizer(model, OptimizerSection(lr=3e-3)), samples, settings), maxlen=0)
    return model


def rollouts(model: Decoder, seed: int, *, prompts_per_step: int = 16, group_size: int = 8) -> Rollouts:
    """By whole answers: 1 if all digits are in order, else 0."""
    settings = RolloutSettings(prompts_per_step, group_size, max_tokens=MOST + 2, seed=seed)
    prompts = sorting.prompts(16_000, 1000 + seed, least=LEAST, most=MOST)
    return Rollouts(model, prompts, sorting.TEXTS, sorting.Sorted(), settings)


def optimizer(model: Decoder, lr: float) -> Optimizer:
    return Optimizer(model, OptimizerSection(lr=lr, weight_decay=0.0))


def critic_of(model: Decoder, lr: float) -> Critic:
    values = ValueModel.of(model)
    return Critic(values, optimizer(values, lr))


def accuracy(source: Rollouts, samples: int = 1) -> float:
    """Of sampled answers to held-out prompts."""
    answers = [t for group in source.answer(HELD_OUT, samples=samples) for t in group]
    return sum(answer.reward for answer in answers) / len(answers)
