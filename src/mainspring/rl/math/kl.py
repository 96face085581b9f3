"""Estimates of KL(π_θ ‖ π_ref) from the tokens that π_θ drew.

Names as in J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html, 2020, with r = π_ref / π_θ.
All take log-probabilities [T] and give [T]; `log_probs` may carry gradients.
"""

from __future__ import annotations

from torch import Tensor


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """−log r: unbiased, of high variance, may be negative. As a loss its expected gradient is 0."""
    return log_probs - reference_log_probs


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """½ (log r)²: biased and of low variance; as a loss its expected gradient is the KL's."""
    return 0.5 * (log_probs - reference_log_probs).square()


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """(r − 1) − log r: unbiased, never negative. Used as a loss by GRPO (Shao et al., arXiv 2402.03300, eq. 4)."""
    log_r = reference_log_probs - log_probs
    return log_r.expm1() - log_r


def k3_with_k2_gradient(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k3's value, for its low variance, and k2's gradient, for its being the KL's in expectation (straight-through)."""
    slope = k2(log_probs, reference_log_probs)
    return slope + (k3(log_probs, reference_log_probs) - slope).detach()
