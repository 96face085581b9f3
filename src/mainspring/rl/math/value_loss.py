"""The critic's loss, and how much of the returns it explains."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import ConfigError


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """(½ max((V − R)², (V_old + clamp(V − V_old, ±clip) − R)²), whether the clip took the gradient), each [T].

    values: [T] with gradients. The pessimistic form of PPO's published code ("value function clipping", the first of
    its code-level optimizations in Engstrom et al., arXiv 2005.12729); `clip=None` leaves the plain square. Raises
    ConfigError.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    if not clip > 0:
        raise ConfigError(f"clip must be above 0, or None for no clipping; got {clip}")
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    # V_old + (V − V_old) may round away from V: what is within reach of the clip is compared with nothing.
    clipped = ((values - old_values).abs() > clip) & (bounded > plain)
    return 0.5 * torch.where(clipped, bounded, plain), clipped


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var[R − V] / Var[R], a scalar: 1 is a perfect critic, 0 one that knows the mean alone; nan if R is constant.

    (Kvålseth, The American Statistician 39(4), 1985, R² with the residuals' mean taken off, as OpenAI Baselines.)
    """
    variance = returns.var(correction=0)
    left = (returns - values).var(correction=0)
    return torch.where(variance > 0, 1 - left / variance, torch.nan)
