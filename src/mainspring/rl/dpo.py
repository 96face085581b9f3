"""Direct preference optimisation and its relatives (IPO, conservative, robust, reference-free): one loop.

    reference = reference_log_probs(model, pairs)                       # before the first step
    for metrics in islice(dpo(model, optimizer, pairs, reference, DpoSettings()), 500):
        print(metrics)

The reference is the model as it was: two numbers a pair, computed once, so no second model is held. Without a
reference (`reference=None`) they are 0. Which loss is an argument: `partial(dpo_loss, beta=0.1)`, `partial(ipo_loss,
tau=0.1)`, or any function of the margins. Rafailov et al., arXiv 2305.18290. A run is (model, optimizer, step, and
the reference): with these it continues to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.math.preferences import dpo_loss
from mainspring.rl.math.segments import sequence_sums
from mainspring.rl.samples import Pair, cut, drawn, written_log_probs
from mainspring.rl.step_settings import SampleSettings
from mainspring.train.optimizer import Optimizer

PreferenceLoss = Callable[[Tensor], Tensor]
"""Margins [N] -> losses [N]; see `math.preferences`."""


@dataclass(frozen=True)
class DpoSettings(SampleSettings):
    """How a run steps. A prompt brings one pair: the group is two answers."""

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
    loss: PreferenceLoss = dpo_loss,
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
            pair_losses = loss(log_ratios[:, 0] - log_ratios[:, 1])
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
    tokens_per_microbatch: int = 8192,
    *,
    loss: PreferenceLoss = dpo_loss,
    mean: bool = False,
) -> Preference:
    """How the model judges pairs, those held out for instance; `reference` as for `dpo`. Raises ConfigError."""
    reference = _checked(reference, pairs, model)
    log_ratios = reference_log_probs(model, pairs, tokens_per_microbatch, mean=mean) - reference
    return _preference(log_ratios, loss(log_ratios[:, 0] - log_ratios[:, 1]))


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
