"""Proximal policy optimisation with a critic (Schulman et al., arXiv 1707.06347), on the engine's rollouts.

    critic = Critic(values := ValueModel.of(model), Optimizer(values, OptimizerSection(lr=2e-5)))
    for metrics in ppo(model, optimizer, critic, rollouts, PpoSettings()):
        print(metrics)

A step: the engine answers; an answer's reward stands at its last token, and every token pays for leaving the reference;
the critic's values turn rewards into advantages and returns; then, over epochs and mini-batches, the critic takes a
step towards the returns and the policy one along the advantages, clipped. Old log-probabilities are the engine's own:
no second forward pass. A run is (model, optimizer, critic, step, the rollouts' state): with these it continues to the
bit. How advantages are estimated and what is minimised are arguments: `vc_ppo` and `vapo` are this loop with others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.parallel.mesh import Group
from mainspring.rl.critic import Critic, Estimate, Experience, judged, value_step
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.math.advantages import gae
from mainspring.rl.math.aggregation import mean_over_sequences, mean_over_tokens
from mainspring.rl.math.policy_loss import clipped_policy_loss, truncated_importance_weights
from mainspring.rl.policy_update import (
    ALONE,
    MicroBatch,
    PolicyOptimizer,
    TokenLoss,
    add_sums,
    common_parts,
    mini_batches,
    policy_gradient,
)
from mainspring.rl.ppo_metrics import PpoMetrics, ppo_metrics
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import PolicyModel, scored_log_probs
from mainspring.rl.step_settings import PolicySettings
from mainspring.rl.trajectories import Packed


@dataclass(frozen=True, kw_only=True)
class PpoSettings(PolicySettings):
    """How a run steps; policy and critic each take one step of their optimizer for every mini-batch."""

    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float | None = 0.5
    whiten: bool = True
    """Advantages of a step get mean 0 and variance 1."""
    loss_mean: Literal["sequences", "tokens"] = "sequences"
    """Whether all answers weigh the same in the policy's loss, or all tokens."""
    kl_reward: float = 0.0
    """β of a penalty β (log π_old − log π_ref) on each token's reward (Ouyang et al., arXiv 2203.02155, eq. 2)."""
    warmup_steps: int = 0
    """First steps in which only the critic learns. The policy's schedule begins after them."""


PolicyLoss = Callable[[Experience], TokenLoss]
"""mini-batch -> what gives a micro-batch's share of its loss; the ranks call it together, once a mini-batch."""


def ppo(
    model: PolicyModel,
    optimizer: PolicyOptimizer,
    critic: Critic,
    rollouts: Rollouts,
    settings: PpoSettings,
    *,
    reference: Decoder | None = None,
    first_step: int = 0,
    estimate: Estimate | None = None,
    loss: PolicyLoss | None = None,
    group: Group = ALONE,
) -> Iterator[PpoMetrics]:
    """Trains up to max_steps; each `next` is one step. first_step: the steps already done by a run that resumes.

    reference: what the policy shall stay near. group: the ranks that run this together, each with its own rollouts
    (`rl.ranks`) and the whole critic. estimate, loss: None for PPO's own, `gae_estimate` and `clipped_loss`.
    Raises ConfigError for what does not fit, MainspringError where a loss is no longer finite, LockstepError where the
    trainer's log-probabilities are not the engine's.
    """
    _check(settings, reference)
    estimate = estimate if estimate is not None else gae_estimate(settings)
    loss = loss if loss is not None else clipped_loss(settings)
    check = LockstepCheck(model, rollouts)
    rollouts.take_weights(first_step)
    tokens_per_microbatch, clip_norm = settings.tokens_per_microbatch, settings.clip_norm
    for step in range(first_step, settings.max_steps):
        groups = rollouts.collect()
        began = time.monotonic()
        answers = [answer for group in groups for answer in group]
        experience = judged(
            answers,
            critic,
            estimate,
            reference=reference,
            kl_reward=settings.kl_reward,
            temperature=rollouts.temperature,
            whiten=settings.whiten,
            tokens_per_microbatch=tokens_per_microbatch,
            group=group,
        )
        policy_learns = step >= settings.warmup_steps
        if settings.importance_cap is not None and policy_learns:
            samples = experience.batch.samples
            nearby = scored_log_probs(check.whole, samples, rollouts.temperature, tokens_per_microbatch)
            experience = replace(experience, nearby_log_probs=nearby)
        check.begin()
        check.score(rollouts.carried()[: settings.carried_checks], tokens_per_microbatch)
        if settings.lockstep_check == "all":
            check.score(answers, tokens_per_microbatch)
        elif not policy_learns:
            check.score(answers[: settings.carried_checks], tokens_per_microbatch)
        totals: dict[str, float] = {}
        cuts = common_parts(len(answers), settings.mini_batches, group, model.device)
        parts = mini_batches(len(answers), cuts, settings.epochs, (settings.seed, step))
        for number, chosen in enumerate(parts):
            mini = experience.select(chosen)
            num_tokens, _ = mini.counts()
            sums = value_step(
                critic,
                mini,
                num_tokens,
                clip=settings.value_clip,
                lr_factor=settings.lr_factor(step),
                clip_norm=clip_norm,
                tokens_per_microbatch=tokens_per_microbatch,
            )
            if policy_learns:
                sums |= policy_gradient(
                    model,
                    optimizer,
                    mini.batch,
                    loss(mini),
                    tokens_per_microbatch=tokens_per_microbatch,
                    temperature=rollouts.temperature,
                    observe=check if number == 0 else None,  # later the weights are not those that wrote
                    group=group,
                )
                sums["grad_norm"] = optimizer.step(settings.lr_factor(step, settings.warmup_steps), clip_norm)
            add_sums(totals, sums, num_tokens, step)
        rollouts.take_weights(step + 1)
        seconds = time.monotonic() - began
        yield ppo_metrics(
            step, groups, experience, totals, policy_learns, check, rollouts.report, seconds, group
        )


def gae_estimate(settings: PpoSettings) -> Estimate:
    """Advantages by GAE; the returns that the critic learns are of the same λ."""

    def estimate(batch: Packed, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        advantages = gae(rewards, values, batch.lengths, gamma=settings.gamma, lam=settings.lam)
        return advantages, advantages + values

    return estimate


def clipped_loss(settings: PpoSettings) -> PolicyLoss:
    """The clipped surrogate, and what the settings add to it."""

    def loss(mini: Experience) -> TokenLoss:
        num_tokens, num_answers = mini.counts()

        def share_of(micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            nearby = mini.nearby_log_probs
            old = micro.old_log_probs if nearby is None else nearby[micro.tokens]
            losses, clipped = clipped_policy_loss(
                micro.log_probs - old,
                mini.advantages[micro.tokens],
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                dual_clip=settings.dual_clip,
            )
            if settings.importance_cap is not None:
                weights = truncated_importance_weights(old - micro.old_log_probs, settings.importance_cap)
                losses = losses * weights
            if settings.entropy_bonus:
                losses = losses - settings.entropy_bonus * micro.entropy
            if settings.kl_loss and mini.reference_log_probs is not None:
                reference = mini.reference_log_probs[micro.tokens]
                losses = losses + settings.kl_loss * kl.k3_with_k2_gradient(micro.log_probs, reference)
            if settings.loss_mean == "tokens":
                share = mean_over_tokens(losses, micro.written, num_tokens=num_tokens)
            else:
                share = mean_over_sequences(losses, micro.written, micro.lengths, num_sequences=num_answers)
            moved = kl.k3(micro.old_log_probs, micro.log_probs)
            return share, {
                "clipped": clipped.sum(),
                "entropy": micro.entropy.sum(),
                "kl_old": moved.sum(),
            }

        return share_of

    return loss


def _check(settings: PpoSettings, reference: Decoder | None) -> None:
    settings.check()
    if not 0 <= settings.warmup_steps < settings.max_steps:
        raise ConfigError(
            f"warmup_steps = {settings.warmup_steps} must be at least 0 and below max_steps = {settings.max_steps}; "
            "the policy learns in the steps after them"
        )
    if reference is None and (settings.kl_reward or settings.kl_loss):
        raise ConfigError(
            "kl_reward and kl_loss need a reference; give the model that the policy shall stay near"
        )
