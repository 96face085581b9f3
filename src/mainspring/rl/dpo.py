"""Direct preference optimisation and its relatives (IPO, conservative, robust, reference-free): one loop.

    reference = reference_log_probs(model, pairs)                       # before the first step
    for metrics in islice(dpo(model, optimizer, pairs, reference, DpoSettings()), 500):
        print(metrics)

The reference is the model as it was: two numbers a pair, computed once, so no second model is held. Without a
reference (`reference=None`) they are 0. Rafailov et al., arXiv 2305.18290. A run is (model, optimizer, step, and the
reference): with these it continues to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.math.preferences import (
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    robust_dpo_loss,
)
from mainspring.rl.math.segments import sequence_sums
from mainspring.rl.samples import Pair, cut, drawn, written_log_probs
from mainspring.rl.step_settings import SampleSettings
from mainspring.train.optimizer import Optimizer


@dataclass(frozen=True)
class DpoSettings(SampleSettings):
    """How a run steps. A prompt brings one pair: the group is two answers."""

    loss: Literal["dpo", "conservative", "robust", "ipo"] = "dpo"
    """See `math.preferences`."""
    beta: float = 0.1
    """How much a margin counts; of IPO its τ, whose margins have the goal 1 / (2 τ)."""
    flipped: float = 0.1
    """ε: the share of labels that are the wrong way round, of "conservative" and "robust"."""
    reference_free: bool = False
    """In a run from a recipe: the reference's log-probabilities count as 0, and it is not loaded."""
    mean_log_probs: bool = False
    """An answer counts by its mean, not its sum, as IPO's authors advise for answers of unequal lengths."""


@dataclass(frozen=True)
class Preference:
    """How a model judges pairs."""

    loss: float
    margin: float
    """Mean of log π/π_ref of the chosen less that of the rejected, in nats; β is not in it."""
    accuracy: float
    """Share of pairs with a margin above 0."""
    chosen: float
    rejected: float
    """Means of log π/π_ref: both may fall while the margin grows."""


@dataclass(frozen=True)
class DpoMetrics:
    """Of one step, before the weights moved."""

    step: int
    preference: Preference
    grad_norm: float
    """Before clipping."""


def dpo(
    model: Decoder,
    optimizer: Optimizer,
    pairs: Sequence[Pair],
    reference: Tensor | None,
    settings: DpoSettings,
    *,
    first_step: int = 0,
) -> Iterator[DpoMetrics]:
    """Trains up to max_steps; each `next` is one step. first_step: the steps already done by a run that resumes.

    reference: [pairs, 2] of `reference_log_probs` with the same `mean` as the settings' `mean_log_probs`. Raises
    ConfigError for what does not fit, MainspringError where the loss is no longer finite.
    """
    reference = _checked(reference, pairs, model)
    steps = drawn(len(pairs), settings.prompts_per_step, settings.seed, first_step)
    for step in range(first_step, settings.max_steps):
        chosen_ones = next(steps)
        batch = [pairs[i] for i in chosen_ones]
        rewards, losses = [], []
        for run in cut([len(pair) for pair in batch], settings.tokens_per_microbatch):
            micro = [batch[i] for i in run]
            anchors = reference[[chosen_ones[i] for i in run]]
            log_ratios = _answer_log_probs(model, micro, settings.mean_log_probs) - anchors  # [n, 2]
            pair_losses = preference_losses(log_ratios[:, 0] - log_ratios[:, 1], settings)
            (pair_losses.sum() / len(batch)).backward()
            optimizer.accumulate()
            rewards.append(log_ratios.detach())
            losses.append(pair_losses.detach())
        judged = _preference(torch.cat(rewards), torch.cat(losses))
        grad_norm = optimizer.step(settings.lr_factor(step), settings.clip_norm)
        if not (math.isfinite(judged.loss) and math.isfinite(grad_norm)):
            raise MainspringError(
                f"step {step + 1}: the loss is {judged.loss} and the gradient's norm {grad_norm}; "
                "lower the learning rate"
            )
        yield DpoMetrics(step + 1, judged, grad_norm)


def preference_losses(margins: Tensor, settings: DpoSettings) -> Tensor:
    """[N] -> [N], by the settings' loss. Raises ConfigError for a weight or a share out of range."""
    beta, flipped = settings.beta, settings.flipped
    match settings.loss:
        case "conservative":
            return conservative_dpo_loss(margins, beta=beta, flipped=flipped)
        case "robust":
            return robust_dpo_loss(margins, beta=beta, flipped=flipped)
        case "ipo":
            return ipo_loss(margins, tau=beta)
        case _:
            return dpo_loss(margins, beta=beta)


@torch.no_grad()
def reference_log_probs(
    model: Decoder, pairs: Sequence[Pair], tokens_per_microbatch: int = 8192, *, mean: bool = False
) -> Tensor:
    """[pairs, 2] float32: log p of the chosen and of the rejected answer. Raises ConfigError."""
    runs = cut([len(pair) for pair in pairs], tokens_per_microbatch)
    found = [_answer_log_probs(model, [pairs[i] for i in run], mean) for run in runs]
    return torch.cat(found) if found else torch.zeros(0, 2, device=model.device)


def judge(
    model: Decoder,
    pairs: Sequence[Pair],
    reference: Tensor | None,
    settings: DpoSettings | None = None,
) -> Preference:
    """How the model judges pairs, those held out for instance; the rest as for `dpo`. Raises ConfigError."""
    settings = settings if settings is not None else DpoSettings()
    reference = _checked(reference, pairs, model)
    tokens, mean = settings.tokens_per_microbatch, settings.mean_log_probs
    log_ratios = reference_log_probs(model, pairs, tokens, mean=mean) - reference
    losses = preference_losses(log_ratios[:, 0] - log_ratios[:, 1], settings)
    return _preference(log_ratios, losses)


def _answer_log_probs(model: Decoder, pairs: Sequence[Pair], mean: bool) -> Tensor:
    """[n, 2], with gradients: of a pair's answers the sum (or mean) of log p over the written tokens."""
    log_p, counts = written_log_probs(model, [s for pair in pairs for s in (pair.chosen, pair.rejected)])
    sums = sequence_sums(log_p, counts)
    return (sums / counts if mean else sums).view(-1, 2)


def _preference(log_ratios: Tensor, losses: Tensor) -> Preference:
    margins = log_ratios[:, 0] - log_ratios[:, 1]
    return Preference(
        loss=float(losses.mean()),
        margin=float(margins.mean()),
        accuracy=float((margins > 0).double().mean()),
        chosen=float(log_ratios[:, 0].mean()),
        rejected=float(log_ratios[:, 1].mean()),
    )


def _checked(reference: Tensor | None, pairs: Sequence[Pair], model: Decoder) -> Tensor:
    if not pairs:
        raise ConfigError("there are no pairs; give at least one")
    if reference is None:
        return torch.zeros(len(pairs), 2, device=model.device)
    if tuple(reference.shape) != (len(pairs), 2):
        raise ConfigError(
            f"the reference has shape {tuple(reference.shape)}, but there are {len(pairs)} pairs; "
            "compute it by reference_log_probs from the same pairs"
        )
    return reference.to(model.device)
