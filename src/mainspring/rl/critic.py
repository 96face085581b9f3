"""What a critic makes of a step's answers, and how it learns from them; `ppo` and its relatives are built of this."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mainspring.model.decoder import Decoder
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.mesh import Group
from mainspring.rl.math import kl
from mainspring.rl.math.advantages import whitened
from mainspring.rl.math.aggregation import mean_over_tokens
from mainspring.rl.math.value_loss import clipped_value_loss
from mainspring.rl.policy_update import ALONE, total
from mainspring.rl.samples import cut, scored_log_probs
from mainspring.rl.trajectories import Packed, Trajectory, pack
from mainspring.rl.value_model import ValueModel
from mainspring.train.optimizer import Optimizer


@dataclass(frozen=True)
class Critic:
    """A value model and what moves it; over ranks each has the whole of it, and gradients are summed."""

    model: ValueModel
    optimizer: Optimizer


@dataclass(frozen=True)
class Experience:
    """A step's answers, or some of them, and what is known of each written token: [W] float32, in their order."""

    answers: tuple[Trajectory, ...]
    batch: Packed
    reference_log_probs: Tensor | None
    rewards: Tensor
    values: Tensor  # before the step
    advantages: Tensor
    returns: Tensor  # what the critic learns
    group: Group  # the ranks that have the rest of them
    nearby_log_probs: Tensor | None = None
    """Of the weights at the step's beginning, where others may have written."""

    def select(self, chosen: Sequence[int]) -> Experience:
        """A mini-batch of them."""
        answers = tuple(self.answers[i] for i in chosen)
        reference, nearby = (
            None if known is None else self.batch.pick(known, chosen)
            for known in (self.reference_log_probs, self.nearby_log_probs)
        )
        rewards, values, advantages, returns = (
            self.batch.pick(known, chosen)
            for known in (self.rewards, self.values, self.advantages, self.returns)
        )
        batch = pack(answers, self.values.device)
        return Experience(answers, batch, reference, rewards, values, advantages, returns, self.group, nearby)

    def counts(self) -> tuple[int, int]:
        """(written tokens, answers) of all ranks, which call this together."""
        device = self.values.device
        num_tokens, num_answers = total([self.batch.num_tokens, len(self.answers)], self.group, device)
        return int(num_tokens), int(num_answers)


Estimate = Callable[[Packed, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(answers, rewards [W], values [W]) -> (advantages [W], returns [W])."""


@torch.no_grad()
def judged(
    answers: Sequence[Trajectory],
    critic: Critic,
    estimate: Estimate,
    *,
    reference: Decoder | None,
    kl_reward: float,
    temperature: float,
    whiten: bool,
    tokens_per_microbatch: int,
    group: Group = ALONE,
) -> Experience:
    """A step's answers with rewards of tokens, values, advantages and returns.

    An answer's reward stands at its last token. With a reference every token pays kl_reward (log π_old − log π_ref)
    (Ouyang et al., arXiv 2203.02155, eq. 2, as verl and TRL spread it). What was cut off counts as ended: no value is
    added for what might have followed. group: the ranks, whose advantages get mean 0 and variance 1 together. Raises
    ConfigError if an answer alone is too long for a micro-batch.
    """
    batch = pack(answers, critic.model.device)
    runs = cut([len(sample.tokens) for sample in batch.samples], tokens_per_microbatch)
    pieces = [batch.samples[run.start : run.stop] for run in runs]
    values = torch.cat([critic.model.written_values(piece) for piece in pieces])
    rewards = torch.zeros_like(values).index_put((batch.last,), batch.rewards)
    log_probs: Tensor | None = None
    if reference is not None:
        log_probs = scored_log_probs(reference, batch.samples, temperature, tokens_per_microbatch)
        rewards = rewards - kl_reward * kl.k1(batch.old_log_probs, log_probs)
    advantages, returns = estimate(batch, rewards, values)
    if whiten:
        advantages = whitened(advantages) if group.size == 1 else _whitened_together(advantages, group)
    return Experience(tuple(answers), batch, log_probs, rewards, values, advantages, returns, group)


def _whitened_together(advantages: Tensor, group: Group, eps: float = 1e-8) -> Tensor:
    """`math.advantages.whitened` of all ranks' advantages, of which these are this rank's."""
    wide = advantages.double()
    sums = [len(wide), float(wide.sum()), float(wide.square().sum())]
    count, first, second = total(sums, group, advantages.device)
    mean = first / count
    variance = max(second - count * mean**2, 0.0) / max(count - 1, 1)
    return (advantages - mean) / math.sqrt(variance + eps)


def value_step(
    critic: Critic,
    mini: Experience,
    num_tokens: int,
    *,
    clip: float | None,
    lr_factor: float,
    clip_norm: float,
    tokens_per_microbatch: int,
) -> dict[str, float]:
    """One step of the critic's optimizer towards the returns -> "value_loss" and "value_grad_norm".

    num_tokens: of all ranks. The loss is the mean over them, however the mini-batch is cut.
    """
    value_loss, first = 0.0, 0
    for run in cut([len(sample.tokens) for sample in mini.batch.samples], tokens_per_microbatch):
        values = critic.model.written_values(mini.batch.samples[run.start : run.stop])
        tokens = slice(first, first + len(values))
        first = tokens.stop
        losses, _ = clipped_value_loss(values, mini.values[tokens], mini.returns[tokens], clip=clip)
        written = torch.ones_like(losses, dtype=torch.bool)
        share = mean_over_tokens(losses, written, num_tokens=num_tokens)
        share.backward()
        critic.optimizer.accumulate()
        value_loss += float(share.detach())
    if mini.group.size > 1:
        critic.optimizer.change_gradients(partial(all_reduce, group=mini.group))
        [value_loss] = total([value_loss], mini.group, critic.model.device)
    return {"value_loss": value_loss, "value_grad_norm": critic.optimizer.step(lr_factor, clip_norm)}
