"""Group-relative policy optimisation and its relatives (Dr. GRPO, DAPO, GSPO): one loop, no critic.

    rollouts = Rollouts(model, prompts, texts, RewardWorker(same_number), RolloutSettings())
    for metrics in grpo(model, optimizer, rollouts, replace(DAPO, max_steps=300)):
        print(metrics)

A step: the engine answers each prompt several times; an answer's advantage is its reward less its group's mean; over
epochs and mini-batches the policy takes a step along the advantages, clipped. Old log-probabilities are the engine's
own: no second forward pass. Shao et al., arXiv 2402.03300. A run is (model, optimizer, step, the rollouts' state):
with these it continues to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.parallel.mesh import Group
from mainspring.rl.dynamic_sampling import draw
from mainspring.rl.grpo_metrics import GrpoMetrics, grpo_metrics
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.math.aggregation import constant_normalised, mean_over_sequences, mean_over_tokens
from mainspring.rl.math.groups import group_advantages
from mainspring.rl.math.length_penalty import overlong_penalty
from mainspring.rl.math.policy_loss import (
    clipped_policy_loss,
    sequence_log_ratio,
    truncated_importance_weights,
)
from mainspring.rl.policy_update import (
    ALONE,
    MicroBatch,
    PolicyOptimizer,
    add_sums,
    common_parts,
    mini_batches,
    policy_gradient,
    total,
)
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import PolicyModel, scored_log_probs
from mainspring.rl.step_settings import PolicySettings
from mainspring.rl.trajectories import Packed, pack

_KL = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "k3_with_k2_gradient": kl.k3_with_k2_gradient}


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(PolicySettings):
    """How a run steps."""

    divide_by_std: bool = True
    ratio: Literal["token", "sequence"] = "token"
    """Of which probabilities the clipped ratio is: a token's, or (GSPO) a whole answer's, to the 1 / length."""
    loss_mean: Literal["sequences", "tokens", "constant"] = "sequences"
    """All answers weigh the same, or all tokens, or (Dr. GRPO) tokens over the budget of tokens."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_with_k2_gradient"] = "k3"
    """Of the KL whose weight is `kl_loss`."""
    dynamic_sampling: bool = False
    """Groups whose rewards are all equal teach nothing: ask further prompts until the step has its groups."""
    max_rounds: int = 10
    """Of dynamic sampling; afterwards the step goes on with the groups it has."""
    overlong_buffer: int = 0
    """The last so many tokens of the budget cost an answer up to `overlong_penalty`; 0 turns this off."""
    overlong_penalty: float = 1.0


DR_GRPO = GrpoSettings(divide_by_std=False, loss_mean="constant")
"""Liu et al., arXiv 2503.20783: no bias by length or by a prompt's difficulty."""
DAPO = GrpoSettings(clip_high=0.28, loss_mean="tokens", dynamic_sampling=True)
"""Yu et al., arXiv 2503.14476; set overlong_buffer where answers may become long."""
GSPO = GrpoSettings(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
"""Zheng et al., arXiv 2507.18071."""


def grpo(
    model: PolicyModel,
    optimizer: PolicyOptimizer,
    rollouts: Rollouts,
    settings: GrpoSettings,
    *,
    reference: Decoder | None = None,
    first_step: int = 0,
    group: Group = ALONE,
) -> Iterator[GrpoMetrics]:
    """Trains up to max_steps; each `next` is one step. first_step: the steps already done by a run that resumes.

    reference: what the policy shall stay near, where kl_loss is set. group: the ranks that run this together, each with
    its own rollouts (`rl.ranks`). Raises ConfigError for what does not fit, MainspringError where the loss is no longer
    finite or no group teaches anything, LockstepError where the trainer's log-probabilities are not the engine's.
    """
    _check(settings, rollouts, reference)
    check = LockstepCheck(model, rollouts)
    rollouts.take_weights(first_step)
    tokens_per_microbatch = settings.tokens_per_microbatch
    for step in range(first_step, settings.max_steps):
        drawn = draw(rollouts, step, max_rounds=settings.max_rounds if settings.dynamic_sampling else None)
        began = time.monotonic()
        answers = [answer for one in drawn.groups for answer in one]
        batch = pack(answers, model.device)
        advantages = _advantages(
            batch, [len(g) for g in drawn.groups], rollouts.settings.max_tokens, settings
        )
        scored = partial(
            scored_log_probs,
            samples=batch.samples,
            temperature=rollouts.temperature,
            tokens_per_microbatch=tokens_per_microbatch,
        )
        anchors = None if reference is None else scored(reference)
        nearby = None if settings.importance_cap is None else scored(check.whole)
        check.begin()
        checked = rollouts.carried()[: settings.carried_checks]
        checked += answers if settings.lockstep_check == "all" else []
        check.score(checked, tokens_per_microbatch)
        totals: dict[str, float] = {}
        cuts = common_parts(len(answers), settings.mini_batches, group, model.device)
        parts = mini_batches(len(answers), cuts, settings.epochs, (settings.seed, step))
        for number, chosen in enumerate(parts):
            mine = pack([answers[i] for i in chosen], model.device)
            num_tokens, num_answers = map(int, total([mine.num_tokens, len(chosen)], group, model.device))
            mini = _Mini(
                mine,
                num_tokens,
                num_answers,
                advantages[chosen],
                *(None if one is None else batch.pick(one, chosen) for one in (anchors, nearby)),
            )
            sums = policy_gradient(
                model,
                optimizer,
                mini.batch,
                partial(_loss, settings, rollouts.settings.max_tokens, mini),
                tokens_per_microbatch=tokens_per_microbatch,
                temperature=rollouts.temperature,
                observe=check if number == 0 else None,  # later the weights are not those that wrote
                group=group,
            )
            sums["grad_norm"] = optimizer.step(settings.lr_factor(step), settings.clip_norm)
            add_sums(totals, sums, num_tokens, step)
        rollouts.take_weights(step + 1)
        seconds = time.monotonic() - began
        yield grpo_metrics(step, drawn, batch, advantages, anchors, totals, check, seconds, group)


def _advantages(batch: Packed, sizes: Sequence[int], max_tokens: int, settings: GrpoSettings) -> Tensor:
    """[N] of each answer."""
    rewards = batch.rewards
    if settings.overlong_buffer:
        penalty = overlong_penalty(batch.lengths, max_tokens=max_tokens, buffer=settings.overlong_buffer)
        rewards = rewards + settings.overlong_penalty * penalty
    return group_advantages(rewards, sizes, divide_by_std=settings.divide_by_std)


@dataclass(frozen=True)
class _Mini:
    """This rank's part of a mini-batch: its N answers and W written tokens."""

    batch: Packed
    num_tokens: int  # written ones of the mini-batch, on all ranks
    num_answers: int
    advantages: Tensor  # [N]
    anchors: Tensor | None  # [W] log-probabilities of the reference
    nearby: Tensor | None  # [W] of the weights at the step's beginning


def _loss(
    settings: GrpoSettings, max_tokens: int, mini: _Mini, micro: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss."""
    old = micro.old_log_probs if mini.nearby is None else mini.nearby[micro.tokens]
    log_ratio = micro.log_probs - old
    if settings.ratio == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, micro.written, micro.lengths)
    losses, clipped = clipped_policy_loss(
        log_ratio,
        mini.advantages[micro.trajectories].repeat_interleave(micro.lengths),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    if settings.importance_cap is not None:
        losses = losses * truncated_importance_weights(old - micro.old_log_probs, settings.importance_cap)
    if settings.entropy_bonus:
        losses = losses - settings.entropy_bonus * micro.entropy
    if settings.kl_loss and mini.anchors is not None:
        penalty = _KL[settings.kl_estimator](micro.log_probs, mini.anchors[micro.tokens])
        losses = losses + settings.kl_loss * penalty
    count = mini.num_answers
    if settings.loss_mean == "tokens":
        share = mean_over_tokens(losses, micro.written, num_tokens=mini.num_tokens)
    elif settings.loss_mean == "sequences":
        share = mean_over_sequences(losses, micro.written, micro.lengths, num_sequences=count)
    else:
        share = constant_normalised(losses, micro.written, num_sequences=count, max_tokens=max_tokens)
    moved = kl.k3(micro.old_log_probs, micro.log_probs)
    return share, {"clipped": clipped.sum(), "entropy": micro.entropy.sum(), "kl_old": moved.sum()}


def _check(settings: GrpoSettings, rollouts: Rollouts, reference: Decoder | None) -> None:
    settings.check()
    if settings.max_rounds < 1:
        raise ConfigError(f"max_rounds = {settings.max_rounds} must be at least 1")
    if rollouts.settings.group_size < 2:
        raise ConfigError(
            f"group_size = {rollouts.settings.group_size}: an answer is compared with its group; take at least 2"
        )
    if settings.kl_loss and reference is None:
        raise ConfigError("kl_loss needs a reference; give the model that the policy shall stay near")
