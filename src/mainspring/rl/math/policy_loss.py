"""The clipped surrogate of policy gradients, for ratios of tokens or of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.rl.math.segments import sequence_sums, spread


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(−min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), whether a clip took the gradient), each [T].

    log_ratio: log π_θ − log π_old, [T], with gradients; advantages: [T]. PPO (Schulman et al., arXiv 1707.06347,
    eq. 7); unequal bounds are DAPO's clip-higher (Yu et al., arXiv 2503.14476, section 3.1). With `dual_clip` = c
    a negative advantage's loss is at most −c A (Ye et al., arXiv 1912.09729, "dual-clip PPO"; verl's always on, at 3).
    Nothing is averaged here: see `aggregation`. Raises ConfigError.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ConfigError(
            f"clip_low must be within [0, 1] and clip_high at least 0, got {clip_low} and {clip_high}"
        )
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ConfigError(
            f"dual_clip must be above 1 + clip_high = {1 + clip_high}, got {dual_clip}; 3 is usual"
        )
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        above = (advantages < 0) & (loss > ceiling)
        loss = torch.where(above, ceiling, loss)
        clipped = clipped | above
    return loss, clipped.detach()


def sequence_log_ratio(log_ratio: Tensor, written: Tensor, lengths: Tensor) -> Tensor:
    """GSPO's log s_i, the mean of the written tokens' log-ratios, at each of the sequence's tokens: [T] -> [T].

    s_i = (π_θ(y)/π_old(y))^(1/|y|) (Zheng et al., arXiv 2507.18071, eq. 7). Gradients reach every token.
    """
    counts = sequence_sums(written.to(log_ratio.dtype), lengths)
    sums = sequence_sums(torch.where(written, log_ratio, 0), lengths)
    return spread(sums / counts.clamp(min=1), lengths)


@torch.no_grad()
def truncated_importance_weights(log_ratio: Tensor, cap: float = 2.0) -> Tensor:
    """min(π_train / π_rollout, cap), [T], without gradients: for tokens that other weights or numerics wrote.

    Biased but of bounded variance (Ionides, J. Comput. Graph. Stat. 17(2), 2008; ρ̄ in IMPALA, Espeholt et al.,
    arXiv 1802.01561, section 4.1). Raises ConfigError.
    """
    if not cap > 0:
        raise ConfigError(f"cap must be above 0, got {cap}")
    return log_ratio.exp().clamp(max=cap)
