"""Supervised fine-tuning: the answers' tokens are made likelier, the prompts' are only read.

    optimizer = Optimizer(model, OptimizerSection(lr=1e-5))
    for metrics in islice(sft(model, optimizer, samples, SftSettings()), 1000):
        print(metrics)

A step's loss is −Σ log p / N over the N written tokens of all its samples, so it does not depend on how the step
is cut into micro-batches. A run is (model, optimizer, step): with these three it continues to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.math.aggregation import mean_over_tokens
from mainspring.rl.samples import Sample, cut, drawn, written_log_probs
from mainspring.rl.step_settings import SampleSettings
from mainspring.train.optimizer import Optimizer


@dataclass(frozen=True)
class SftSettings(SampleSettings):
    """How a run steps."""


@dataclass(frozen=True)
class SftMetrics:
    """Of one step."""

    step: int
    loss: float
    """Nats a written token, before the step."""
    tokens: int
    """Written ones."""
    grad_norm: float
    """Before clipping."""


def sft(
    model: Decoder,
    optimizer: Optimizer,
    samples: Sequence[Sample],
    settings: SftSettings,
    *,
    first_step: int = 0,
) -> Iterator[SftMetrics]:
    """Trains up to max_steps; each `next` is one step. first_step: the steps already done by a run that resumes.

    Raises ConfigError for settings that do not fit the samples, MainspringError where the loss is no longer finite.
    """
    steps = drawn(len(samples), settings.prompts_per_step, settings.seed, first_step)
    for step in range(first_step, settings.max_steps):
        batch = [samples[i] for i in next(steps)]
        num_tokens = sum(sample.num_written for sample in batch)
        step_loss = 0.0
        for run in cut([len(sample.tokens) for sample in batch], settings.tokens_per_microbatch):
            log_p, _ = written_log_probs(model, [batch[i] for i in run])
            loss = mean_over_tokens(-log_p, torch.ones_like(log_p, dtype=torch.bool), num_tokens=num_tokens)
            loss.backward()
            optimizer.accumulate()
            step_loss += float(loss.detach())
        grad_norm = optimizer.step(settings.lr_factor(step), settings.clip_norm)
        if not (math.isfinite(step_loss) and math.isfinite(grad_norm)):
            raise MainspringError(
                f"step {step + 1}: the loss is {step_loss} and the gradient's norm {grad_norm}; lower the learning rate"
            )
        yield SftMetrics(step + 1, step_loss, num_tokens, grad_norm)


@torch.no_grad()
def sft_loss(model: Decoder, samples: Sequence[Sample], tokens_per_microbatch: int = 8192) -> float:
    """Nats a written token over all samples, those held out for instance. Raises ConfigError."""
    if not samples:
        raise ConfigError("there are no samples; give at least one")
    total = 0.0
    for run in cut([len(sample.tokens) for sample in samples], tokens_per_microbatch):
        total -= float(written_log_probs(model, [samples[i] for i in run])[0].sum(dtype=torch.float64))
    return total / sum(sample.num_written for sample in samples)
