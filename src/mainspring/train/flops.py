"""Model FLOPs utilisation: the arithmetic that the model needs over what the hardware could do.

MFU = (FLOPs per second of forward and backward) / (peak FLOPs per second), with

    FLOPs = 6 · (weights in matrix products) · (tokens) + 12 · Σ_layers (query width) · (query–key pairs)

(Chowdhery et al., arXiv 2204.02311, appendix B, with attention counted causally: a window of n tokens has
n (n + 1) / 2 pairs.) The output head counts, the embedding look-up does not; of a mixture of experts, the
chosen experts count. Recomputation and the optimizer do not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from mainspring.formats.model_config import ModelConfig

# Dense peak of the matrix units in FLOP/s, by the vendors' datasheets; bfloat16 and float32 (tf32 off).
_DEVICE_PEAKS = {
    "H200": (989.4e12, 66.9e12),
    "H100": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "4090": (165.2e12, 82.6e12),
}


def matrix_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * query + 2 * key)
    total = config.vocab_size * config.hidden_size
    for moe in config.moe_layers:
        total += attention
        if moe:
            total += config.hidden_size * config.num_experts
            total += 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_token
        else:
            total += 3 * config.hidden_size * config.intermediate_size
    return total


def training_flops(config: ModelConfig, lengths: Iterable[int]) -> int:
    """FLOPs of one forward and backward pass over windows of the given lengths."""
    tokens = pairs = 0
    windowed: dict[int, int] = {}
    for n in lengths:
        tokens += n
        pairs += n * (n + 1) // 2
        for window in {w for w in config.sliding_windows if w is not None}:
            seen = min(n, window)
            windowed[window] = windowed.get(window, 0) + seen * (seen + 1) // 2 + (n - seen) * window
    width = config.num_heads * config.head_dim
    attended = sum(pairs if window is None else windowed[window] for window in config.sliding_windows)
    return 6 * matrix_weights(config) * tokens + 12 * width * attended


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(peak FLOP/s, where the number is from): a datasheet, or a short matrix product measured here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, (low, full) in _DEVICE_PEAKS.items():
            if key in name:
                return (full if dtype == torch.float32 else low), f"datasheet of {name}"
    return _measured_peak(device, dtype), "measured matrix product"


def _measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    generator = torch.Generator().manual_seed(0)  # the run's own random state stays as it is
    a, b = torch.randn(2, size, size, generator=generator).to(device, dtype).unbind(0)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
