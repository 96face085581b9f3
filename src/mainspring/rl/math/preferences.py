"""Losses of pairs, one answer preferred to the other.

`margins` [N] are h = log π_θ(y_w)/π_ref(y_w) − log π_θ(y_l)/π_ref(y_l), of whole answers; all losses are [N].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mainspring.errors import ConfigError


def dpo_loss(margins: Tensor, *, beta: float = 0.1) -> Tensor:
    """−log σ(β h) (Rafailov et al., arXiv 2305.18290, eq. 7). Raises ConfigError."""
    _check_beta(beta)
    return -F.logsigmoid(beta * margins)


def conservative_dpo_loss(margins: Tensor, *, beta: float = 0.1, flipped: float = 0.1) -> Tensor:
    """−(1 − ε) log σ(β h) − ε log σ(−β h), where ε of the labels are the wrong way round; bounded below.

    Least at σ(β h) = 1 − ε (Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023, eq. 3).
    Raises ConfigError.
    """
    _check_beta(beta)
    _check_flipped(flipped)
    z = beta * margins
    return -(1 - flipped) * F.logsigmoid(z) - flipped * F.logsigmoid(-z)


def robust_dpo_loss(margins: Tensor, *, beta: float = 0.1, flipped: float = 0.1) -> Tensor:
    """(−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2ε): in expectation over flipped labels it is the clean loss.

    Chowdhury et al., arXiv 2403.00409 (robust DPO). Raises ConfigError.
    """
    _check_beta(beta)
    _check_flipped(flipped)
    z = beta * margins
    return (-(1 - flipped) * F.logsigmoid(z) + flipped * F.logsigmoid(-z)) / (1 - 2 * flipped)


def ipo_loss(margins: Tensor, *, tau: float = 0.1) -> Tensor:
    """(h − 1/(2τ))²: the margin has a goal instead of growing without end (Azar et al., arXiv 2310.12036, eq. 17).

    Raises ConfigError.
    """
    if not tau > 0:
        raise ConfigError(f"tau must be above 0, got {tau}")
    return (margins - 1 / (2 * tau)).square()


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, margin: float | Tensor = 0.0) -> Tensor:
    """−log σ(r_w − r_l − m) of a reward model's scores, each [N] (Ouyang et al., arXiv 2203.02155, eq. 1).

    m, 0 there, is how much better the chosen one must be (Touvron et al., arXiv 2307.09288, eq. 2).
    """
    return -F.logsigmoid(chosen - rejected - margin)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ConfigError(f"beta must be above 0, got {beta}")


def _check_flipped(flipped: float) -> None:
    if not 0 <= flipped < 0.5:
        raise ConfigError(f"the share of flipped labels must be within [0, 0.5), got {flipped}")
