"""Inverse frequencies of the rotary embedding under every scaling that Hugging Face configs name.

The formulas are evaluated in the order of transformers' `modeling_rope_utils`, so that fp32 results agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mainspring.formats.model_config import ModelConfig
from mainspring.formats.rope_scaling import RopeScaling
from mainspring.ops import RopeAngles, TokenBatch


class RotaryEmbedding:
    """The angles of a batch's positions. Holds fp32 frequencies, never cast to the model's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.inv_freq, self.scale = inverse_frequencies(config, config.max_position_embeddings)

    def angles(self, batch: TokenBatch) -> RopeAngles:
        """Of all layers: R = head_dim."""
        device = batch.positions.device
        if self.inv_freq.device != device:
            self.inv_freq = self.inv_freq.to(device)
        scaling = self.config.rope_scaling
        longest = max(batch.rope_lengths)
        if scaling is None or scaling.kind != "dynamic" or longest <= self.config.max_position_embeddings:
            return RopeAngles(batch.positions, self.inv_freq, scale=self.scale)
        # Each sequence has a base of its own: a row of frequencies for each.
        own = torch.stack([inverse_frequencies(self.config, length)[0] for length in batch.rope_lengths])
        rows = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
        return RopeAngles(batch.positions, own.to(device), rows.to(device), self.scale)


def inverse_frequencies(config: ModelConfig, length: int) -> tuple[Tensor, float]:
    """(inv_freq [head_dim / 2] float32, factor on cos and sin) for sequences of `length` tokens.

    Only `dynamic` looks at the length. Sources: linear, arXiv 2306.15595; dynamic (NTK-aware), as in
    transformers; yarn, arXiv 2309.00071, section 3.2 and equation 15; llama3, the Llama 3.1 release.
    """
    scaling, dim, base = config.rope_scaling, config.head_dim, config.rope_theta
    if scaling is None:
        return _plain(base, dim), 1.0
    if scaling.kind == "linear":
        return _plain(base, dim) / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        limit = config.max_position_embeddings
        stretch = scaling.factor * max(length, limit) / limit - (scaling.factor - 1)
        return _plain(base * stretch ** (dim / (dim - 2)), dim), 1.0
    if scaling.kind == "llama3":
        return _llama3(scaling, _plain(base, dim)), 1.0
    return _yarn(scaling, base, dim)


def _plain(base: float, dim: int) -> Tensor:
    return 1.0 / _position_wavelengths(base, dim)


def _position_wavelengths(base: float, dim: int) -> Tensor:
    power: Tensor = base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim)
    return power


def _llama3(scaling: RopeScaling, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None  # RopeScaling checks its own fields
    wavelength = 2 * math.pi / inv_freq
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(medium, between, scaled)


def _yarn(scaling: RopeScaling, base: float, dim: int) -> tuple[Tensor, float]:
    """NTK-by-parts interpolation and the attention temperature, folded into cos and sin."""
    context = scaling.original_max_position_embeddings
    assert context is not None  # RopeScaling checks its own fields

    def dimension_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # an empty ramp would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    wavelengths = _position_wavelengths(base, dim)
    inv_freq = 1.0 / (scaling.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
    return inv_freq, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
