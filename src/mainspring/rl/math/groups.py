"""Advantages relative to the other answers to the same prompt: no critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mainspring.errors import ConfigError


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group_sizes: Sequence[int], *, divide_by_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """(r − mean) / (std + eps) within each group -> [N], as rewards.

    rewards: [N], groups end to end, of the given sizes. The standard deviation has N − 1 in its denominator, as
    verl's. GRPO (Shao et al., arXiv 2402.03300, section 4.1.2); without `divide_by_std`, Dr. GRPO (Liu et al.,
    arXiv 2503.20783, section 3.2), which gives easy and hard prompts no extra weight. A group of one has
    nothing to be compared with: 0 (verl leaves it its reward). Raises ConfigError where the sizes do not fit.
    """
    if any(size < 1 for size in group_sizes) or sum(group_sizes) != rewards.shape[0]:
        raise ConfigError(
            f"group sizes {list(group_sizes)} must be at least 1 and sum to the {rewards.shape[0]} rewards"
        )
    advantages = torch.zeros_like(rewards)
    for target, group in zip(
        advantages.split(list(group_sizes)), rewards.split(list(group_sizes)), strict=True
    ):
        if len(group) == 1:
            continue
        centred = group - group.mean()
        target.copy_(centred / (group.std(correction=1) + eps) if divide_by_std else centred)
    return advantages
