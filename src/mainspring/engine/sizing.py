"""How long sequences may be and how large the cache is: what the model and the machine decide."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.ranks.shard import CacheShape
from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig

_CPU_SHARE = 0.25
_CPU_LIMIT_BYTES = 4 << 30
_GPU_SHARE = 0.92
_GPU_RESERVE_BYTES = 512 << 20  # graphs, kernels, and what the allocator loses at its seams
_KEY_CHUNK, _PARTIAL_ROWS = (
    1024,
    16,
)  # of the decode kernels: keys of a unit of work, and its query rows at most
_CPU_BATCHED_TOKENS = 512
_GPU_BATCHED_TOKENS = 8192
_CPU_SEQUENCES = 64
# A GPU has a seat for each so many tokens of its cache, in steps, and from 256 to 1,024 seats: of requests as long as
# the throughput benchmark's (848 tokens on average while they run) hardly any is preempted then.
_TOKENS_PER_SEAT = 960
_SEAT_STEP = 64
_GPU_SEQUENCES, _GPU_MOST_SEQUENCES = 256, 1024


def context_length(config: ModelConfig) -> int:
    """Tokens that the model's positions cover, its RoPE scaling counted in."""
    scaling = config.rope_scaling
    length = config.max_position_embeddings
    if scaling is None or scaling.kind == "llama3":  # llama3: max_position_embeddings is the scaled length
        return length
    original = scaling.original_max_position_embeddings or length
    return max(length, math.floor(original * scaling.factor))


def max_model_len(engine: EngineConfig, config: ModelConfig) -> int:
    """The longest sequence that the engine takes. Raises ConfigError if more is asked than the model covers."""
    context = context_length(config)
    if engine.max_model_len is None:
        return context
    if engine.max_model_len > context:
        raise ConfigError(
            f"max_model_len is {engine.max_model_len}, but the model's context is {context} tokens; lower it"
        )
    return engine.max_model_len


def with_seats(
    engine: EngineConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    *,
    shape: CacheShape | None = None,
    free: Callable[[], int] | None = None,
) -> EngineConfig:
    """The settings with `max_num_seqs` filled in: on a GPU, by how many requests of usual length the cache holds.

    Arguments and errors of `num_cache_blocks`.
    """
    if engine.max_num_seqs is not None:
        return engine
    seats = _CPU_SEQUENCES
    if device.type == "cuda":
        fewest = replace(engine, max_num_seqs=_GPU_SEQUENCES)
        tokens = _affordable_blocks(fewest, config, dtype, device, longest, shape, free) * engine.block_size
        seats = tokens // min(_TOKENS_PER_SEAT, longest) // _SEAT_STEP * _SEAT_STEP
        seats = min(max(seats, _GPU_SEQUENCES), _GPU_MOST_SEQUENCES)
    return replace(engine, max_num_seqs=min(seats, max_num_batched_tokens(engine, device)))


def max_num_seqs(engine: EngineConfig, device: torch.device) -> int:
    """How many requests are to run at once, as far as the step's budget lets them."""
    default = _GPU_SEQUENCES if device.type == "cuda" else _CPU_SEQUENCES
    wanted = default if engine.max_num_seqs is None else engine.max_num_seqs
    return min(wanted, max_num_batched_tokens(engine, device))


def max_num_batched_tokens(engine: EngineConfig, device: torch.device) -> int:
    """The step's budget of tokens, never below the number of seats."""
    if engine.max_num_batched_tokens is not None:
        return engine.max_num_batched_tokens
    default = _GPU_BATCHED_TOKENS if device.type == "cuda" else _CPU_BATCHED_TOKENS
    return max(default, engine.max_num_seqs or 0)


def cache_dtype(engine: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are stored as. Raises ConfigError where fp8 is not to be had."""
    if engine.kv_cache_dtype == "auto":
        return dtype
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"kv_cache_dtype is 'fp8', which needs a GPU and a 16-bit model, not {dtype} on {device.type}; "
            "leave it at 'auto'"
        )
    return torch.float8_e4m3fn


def num_cache_blocks(
    engine: EngineConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    *,
    shape: CacheShape | None = None,
    free: Callable[[], int] | None = None,
) -> int:
    """Usable blocks of the KV cache (the null block comes on top). Raises ConfigError if not even one fits.

    dtype: of the cache; longest: the longest sequence in tokens; shape: what of each token this process holds, None for
    all; free: the memory in bytes of which a share may be taken, None for what is free here.
    """
    blocks = _affordable_blocks(engine, config, dtype, device, longest, shape, free)
    if engine.num_blocks is not None or engine.kv_cache_bytes is not None:
        return blocks
    return max(1, min(blocks, max_num_seqs(engine, device) * -(-longest // engine.block_size)))


def _affordable_blocks(
    engine: EngineConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    shape: CacheShape | None,
    free: Callable[[], int] | None,
) -> int:
    """As `num_cache_blocks`, were there any number of sequences to fill them."""
    if engine.num_blocks is not None:
        return engine.num_blocks
    if shape is None:
        shape = CacheShape(config.num_layers, config.num_kv_heads, config.head_dim)
    block_bytes = 2 * shape.num_layers * engine.block_size * shape.row_bytes(dtype.itemsize)
    if engine.kv_cache_bytes is not None:
        blocks = engine.kv_cache_bytes // block_bytes - 1
        if blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes is {engine.kv_cache_bytes}, but the smallest cache (two blocks of "
                f"{engine.block_size} tokens) takes {2 * block_bytes} bytes"
            )
        return blocks
    available = free() if free is not None else free_bytes(device)
    budget = _default_cache_bytes(engine, config, device, longest, available)
    if budget < 2 * block_bytes and device.type == "cuda":
        needed = workspace_bytes(engine, config, device, longest) >> 20
        raise ConfigError(
            f"no memory is left for the KV cache: beside the model, the largest step needs about {needed} MiB; lower "
            "max_num_batched_tokens, max_num_seqs or max_model_len, or size the cache by kv_cache_bytes"
        )
    return budget // block_bytes - 1


def workspace_bytes(engine: EngineConfig, config: ModelConfig, device: torch.device, longest: int) -> int:
    """About what the largest step needs beside weights and cache, in a model of 16 bits.

    Of each token the widest tensors of a layer that live at one time; of each seat its logits in float32, three times
    (as they come, adjusted, and the sampler's own), and what attention keeps of each chunk of keys of the longest
    sequence, since graphs hold the memory for any lengths.
    """
    seats = max_num_seqs(engine, device)
    experts = config.num_experts_per_token * config.moe_intermediate_size
    inner = max(config.intermediate_size, experts)
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    token = 2 * (3 * inner + heads + 6 * config.hidden_size)
    chunk = 4 * config.num_kv_heads * _PARTIAL_ROWS * (config.head_dim + 2)
    of_seat = 3 * 4 * config.vocab_size + -(-longest // _KEY_CHUNK) * chunk
    return token * max_num_batched_tokens(engine, device) * 5 // 4 + seats * of_seat


def _default_cache_bytes(
    engine: EngineConfig, config: ModelConfig, device: torch.device, longest: int, free: int
) -> int:
    if device.type == "cuda":
        return int(free * _GPU_SHARE) - workspace_bytes(engine, config, device, longest) - _GPU_RESERVE_BYTES
    return min(_CPU_LIMIT_BYTES, int(free * _CPU_SHARE))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on a CPU, that can be taken without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return _free_host_bytes()


def _free_host_bytes() -> int:
    """Memory that can be taken without swapping, within the container's limit if there is one."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists():
        text = limit.read_text().strip()
        if text != "max":
            free = min(free, max(0, int(text) - int(used.read_text())))
    return free
