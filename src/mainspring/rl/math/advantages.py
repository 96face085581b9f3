"""Generalised advantage estimation along packed sequences, and its decoupled and length-adaptive forms."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.rl.math.segments import check_lengths, from_rows, sequence_sums, to_rows


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    written: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t (Schulman et al., arXiv 1506.02438, eq. 16).

    rewards, values: [T], of each token; lengths: [S]; lam: one for all, or [S]; bootstrap: [S], the value
    after the last token of a sequence that was cut short (0 where it ended). -> advantages [T].

    Tokens that are not `written` are no actions: their advantage is 0, no time passes over them (neither γ nor
    λ is applied, V_{t+1} is that of the next written token), and a reward upon one belongs to the last written
    token before it; without one before it, to none. Raises ConfigError where shapes do not fit.
    """
    _check_scan(rewards, values, lengths, written)
    count = lengths.shape[0]
    if rewards.shape[0] == 0:
        return torch.zeros_like(values)
    reward_rows, value_rows = to_rows(rewards, lengths), to_rows(values, lengths)
    acts = torch.ones_like(rewards, dtype=torch.bool) if written is None else written
    act_rows = to_rows(acts, lengths, False).bool()
    per_step = lam * gamma if isinstance(lam, float | int) else (lam * gamma).to(values)
    next_value = values.new_zeros(count) if bootstrap is None else bootstrap.to(values)
    next_advantage = values.new_zeros(count)
    late_reward = values.new_zeros(count)  # of tokens behind t that are no actions
    advantage_rows = torch.zeros_like(value_rows)
    for t in reversed(range(value_rows.shape[1])):
        act = act_rows[:, t]
        reward = late_reward + reward_rows[:, t]
        delta = reward + gamma * next_value - value_rows[:, t]
        advantage = delta + per_step * next_advantage
        advantage_rows[:, t] = torch.where(act, advantage, 0)
        next_advantage = torch.where(act, advantage, next_advantage)
        next_value = torch.where(act, value_rows[:, t], next_value)
        late_reward = torch.where(act, 0, reward)
    return from_rows(advantage_rows, lengths)


@torch.no_grad()
def decoupled_gae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    gamma: float = 1.0,
    policy_lam: float | Tensor = 0.95,
    critic_lam: float | Tensor = 1.0,
    written: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages under policy_lam, value targets under critic_lam), each [T].

    The critic learns from returns of its own λ (1: Monte-Carlo, without bias), the policy from less variance
    (VC-PPO, Yuan et al., arXiv 2503.01491, "Decoupled-GAE"). A target is gae(critic_lam) + value; at tokens
    that are not written it is the value itself. Arguments as for `gae`.
    """
    advantages = gae(
        rewards, values, lengths, gamma=gamma, lam=policy_lam, written=written, bootstrap=bootstrap
    )
    critic = gae(rewards, values, lengths, gamma=gamma, lam=critic_lam, written=written, bootstrap=bootstrap)
    return advantages, critic + values


def length_adaptive_lambda(
    written: Tensor, lengths: Tensor, *, alpha: float = 0.05, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """λ = 1 − 1/(α l) of each sequence, l its written tokens, kept within [low, high] -> [S] float64.

    So that the coefficients of the TD errors sum to about α l (VAPO, Yue et al., arXiv 2504.05118,
    "Length-Adaptive GAE", with α = 0.05 there). Below l = 1/α the formula is negative, which the paper's long answers
    do not meet: `low` takes over. Raises ConfigError.
    """
    if not alpha > 0:
        raise ConfigError(f"alpha must be above 0, got {alpha}")
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"0 <= low <= high <= 1 must hold, got low = {low}, high = {high}")
    counts = sequence_sums(written.to(torch.float64), lengths)
    return (1 - 1 / (alpha * counts.clamp(min=1))).clamp(low, high)


@torch.no_grad()
def whitened(advantages: Tensor, eps: float = 1e-8) -> Tensor:
    """(A − mean) / sqrt(variance + eps) over all of a step's actions, [W] -> [W], the variance with W − 1 as verl's.

    It keeps the policy's step from depending on the rewards' scale (as verl's `masked_whiten` after GAE). One
    advantage alone becomes 0.
    """
    if advantages.shape[0] < 2:
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) * torch.rsqrt(advantages.var(correction=1) + eps)


def _check_scan(rewards: Tensor, values: Tensor, lengths: Tensor, written: Tensor | None) -> None:
    check_lengths(lengths, rewards.shape[0])
    for name, tensor in (("values", values), ("written", written)):
        if tensor is not None and tensor.shape != rewards.shape:
            raise ConfigError(
                f"{name} has shape {tuple(tensor.shape)}, rewards {tuple(rewards.shape)}; both are one per token"
            )
