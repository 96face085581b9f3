"""The engine's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mainspring.engine.speculative import SpeculativeConfig
from mainspring.errors import ConfigError

SchedulingPolicy = Literal["fcfs", "priority"]
KVCacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Validated on construction; what depends on model and machine is resolved by `EngineCore`.

    Attributes:
        max_num_seqs: most requests that run at once; never more than `max_num_batched_tokens`, so that
            a step has room for a token of each. None: 64 on a CPU; on a GPU one for each 960 tokens of its cache, from
            256 to 1,024.
        max_num_batched_tokens: most tokens in one forward pass, prompt chunks and decodes together; None:
            512 on a CPU (a step stays short enough for the streams beside a long prompt), 8,192 on a GPU.
        block_size: tokens a KV block.
        kv_cache_bytes: memory for the KV cache; None: a quarter of the free memory on a CPU (at most 4 GiB),
            on a GPU what the largest step leaves of it; and never more than `max_num_seqs` sequences of full
            length need.
        num_blocks: size the cache by usable blocks instead of bytes; give one of the two.
        max_model_len: longest sequence in tokens; None: the model's own context.
        max_logprobs: most alternatives a request may ask for.
        logprobs_temperature: reported log-probabilities are those of the raw logits over this; 1, as in vLLM, or the
            one temperature at which RL samples.
        enable_prefix_caching: keep the keys and values of finished requests until their blocks are needed, and share
            those of equal beginnings.
        kv_cache_dtype: "auto" is the model's; "fp8" (float8 e4m3, GPU only) holds twice the tokens. Its
            log-probabilities are not the trainer's to the last bit, so RL refuses it.
        scheduling_policy: "fcfs" serves in order of arrival, "priority" by `EngineRequest.priority` first.
        cuda_graphs: replay decode steps from CUDA graphs; None: on a GPU.
        async_scheduling: launch a step before the tokens of the one before have come to the host; None: on a GPU.
        lora_adapters: name -> directory of a LoRA adapter as PEFT writes it; their ids count from 1 in this order.
        speculative: guess tokens and verify several in one step; None: not.
        seed: makes requests without a seed reproducible (in their order of arrival); None: from the system.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    max_model_len: int | None = None
    max_logprobs: int = 20
    logprobs_temperature: float = 1.0
    enable_prefix_caching: bool = True
    kv_cache_dtype: KVCacheDtype = "auto"
    scheduling_policy: SchedulingPolicy = "fcfs"
    cuda_graphs: bool | None = None
    async_scheduling: bool | None = None
    lora_adapters: dict[str, str] | None = None
    speculative: SpeculativeConfig | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_bytes",
            "num_blocks",
            "max_model_len",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, but must be a whole number of at least 1")
        if self.max_logprobs < 0:
            raise ConfigError(f"max_logprobs is {self.max_logprobs}, but must be at least 0")
        if not 0 < self.logprobs_temperature < math.inf:
            raise ConfigError(
                f"logprobs_temperature is {self.logprobs_temperature}, but must be a number above 0"
            )
        for name, allowed in (
            ("kv_cache_dtype", get_args(KVCacheDtype)),
            ("scheduling_policy", get_args(SchedulingPolicy)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}"
                )
        if self.kv_cache_bytes is not None and self.num_blocks is not None:
            raise ConfigError(
                f"kv_cache_bytes ({self.kv_cache_bytes}) and num_blocks ({self.num_blocks}) both size "
                "the cache; give one of them"
            )
