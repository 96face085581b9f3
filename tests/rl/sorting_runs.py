"""Runs on sorting long enough to show that an algorithm learns: a partly trained model, and how it is trained on.

Slow tests and `benchmarks/rl_sorting.py`, `benchmarks/rl_ablation.py` share them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

from mainspring.model.decoder import Decoder
from mainspring.rl.critic import Critic
from mainspring.rl.grpo import DAPO, grpo
from mainspring.rl.grpo_metrics import GrpoMetrics
from mainspring.rl.ppo import PpoSettings, ppo
from mainspring.rl.ppo_metrics import PpoMetrics
from mainspring.rl.prompts import Prompt
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import Sample
from mainspring.rl.sft import SftSettings, sft
from mainspring.rl.value_model import ValueModel
from mainspring.rl.vapo import VapoSettings, vapo
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import sorting

Algorithm = Literal["grpo", "ppo", "vapo"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
STEPS = 300

DIGITS = (4, 7)  # of a prompt, at least and at most
WARM = ScheduleSection(kind="constant", warmup_fraction=0.05)


def held_out(digits: tuple[int, int] = DIGITS, count: int = 200) -> list[Prompt]:
    """Prompts that no run learns from."""
    return sorting.prompts(count, 99, least=digits[0], most=digits[1])


def partly_trained(steps: int = 120, seed: int = 0, digits: tuple[int, int] = DIGITS) -> Decoder:
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
    prompts = sorting.prompts(32 * steps, 7 + seed, least=digits[0], most=digits[1])
    samples = [Sample.answer(p.tokens, [*sorting.encode(p.reference), sorting.END]) for p in prompts]
    settings = SftSettings(32, max_steps=steps, schedule=WARM, seed=seed)
    deque(sft(model, Optimizer(model, OptimizerSection(lr=3e-3)), samples, settings), maxlen=0)
    return model


def rollouts(
    model: Decoder, seed: int, *, prompts_per_step: int, group_size: int, digits: tuple[int, int] = DIGITS
) -> Rollouts:
    """By whole answers: 1 if all digits are in order, else 0."""
    settings = RolloutSettings(prompts_per_step, group_size, max_tokens=digits[1] + 2, seed=seed)
    prompts = sorting.prompts(16_000, 1000 + seed, least=digits[0], most=digits[1])
    return Rollouts(model, prompts, sorting.TEXTS, sorting.Sorted(), settings)


def optimizer(model: Decoder, lr: float) -> Optimizer:
    return Optimizer(model, OptimizerSection(lr=lr, weight_decay=0.0))


def critic_of(model: Decoder, lr: float) -> Critic:
    values = ValueModel.of(model)
    return Critic(values, optimizer(values, lr))


def accuracy(source: Rollouts, samples: int = 1, prompts: Sequence[Prompt] | None = None) -> float:
    """Of sampled answers to held-out prompts."""
    prompts = held_out() if prompts is None else prompts
    answers = [t for group in source.answer(prompts, samples=samples) for t in group]
    return sum(answer.reward for answer in answers) / len(answers)


def start(algorithm: Algorithm, model: Decoder, seed: int = 0) -> Rollouts:
    """As many prompts and answers a step as suit it. A critic learns from the prompts' number: PPO asks each once."""
    prompts_per_step, group_size = {"grpo": (32, 8), "ppo": (128, 1), "vapo": (64, 4)}[algorithm]
    return rollouts(model, seed, prompts_per_step=prompts_per_step, group_size=group_size)


def train(
    algorithm: Algorithm, model: Decoder, source: Rollouts, steps: int = STEPS, seed: int = 0
) -> Iterator[GrpoMetrics | PpoMetrics]:
    """One run; each `next` is one step."""
    policy = optimizer(model, lr=5e-4)
    if algorithm == "grpo":
        plain = replace(DAPO, dynamic_sampling=False, mini_batches=2, entropy_bonus=0.01)
        return grpo(model, policy, source, replace(plain, max_steps=steps, schedule=WARM, seed=seed))
    critic = critic_of(model, lr=5e-4)
    if algorithm == "ppo":
        settings = PpoSettings(
            max_steps=steps, mini_batches=2, schedule=WARM, seed=seed, lam=1.0, entropy_bonus=0.01
        )
        return ppo(model, policy, critic, source, settings)
    # Answers have 5 to 8 tokens: alpha = 1 gives them a λ of 0.8 to 0.875.
    full = VapoSettings(
        max_steps=steps,
        warmup_steps=min(10, steps - 1),
        mini_batches=2,
        schedule=WARM,
        seed=seed,
        alpha=1.0,
        shortest_lam=0.5,
        entropy_bonus=0.01,
    )
    return vapo(model, policy, critic, source, full)
