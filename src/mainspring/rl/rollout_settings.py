"""How much a step of rollouts writes, and what is refused because its probabilities would not be the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.rl.prompts import Prompt, Texts

UNCHANGED = SamplingParams()
# Sampling that is no longer the model's own distribution: the ratio of a policy gradient would be another's.
_REFUSED = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "stop",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
)


@dataclass(frozen=True)
class RolloutSettings:
    """How much is written in a step."""

    prompts_per_step: int = 32
    group_size: int = 8
    max_tokens: int = 256
    """Most tokens that the policy writes in one conversation, all turns together."""
    slice_tokens: int | None = None
    """Most tokens that a conversation gets in one step; what is unfinished then goes on in the next, under its
    weights (partial rollouts; Kimi k1.5, arXiv 2501.12599, section 2.6.2). None: all in one step."""
    max_turns: int = 8
    """Of a conversation with an environment."""
    seed: int = 0
    free_cache: bool = True
    """Give the cache's memory back while the weights are trained."""
    max_failures: int = 100
    """Environments that may raise, in all, before the run stops; the reward worker has a limit of its own."""


def check_rollouts(
    settings: RolloutSettings,
    sampling: SamplingParams,
    engine: EngineConfig,
    model: Decoder,
    prompts: Sequence[Prompt],
    texts: Texts,
) -> None:
    """Raises ConfigError."""
    for name in ("prompts_per_step", "group_size", "max_tokens", "slice_tokens", "max_turns"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
    if not prompts:
        raise ConfigError("there are no prompts; give at least one")
    if not texts.ends and not sampling.stop_token_ids:
        raise ConfigError("no token ends an answer; name the end token, or stop_token_ids")
    for name in _REFUSED:
        if getattr(sampling, name) != getattr(UNCHANGED, name):
            raise ConfigError(
                f"sampling with {name} = {getattr(sampling, name)!r} draws from another distribution than the "
                "model's, whose probabilities training needs; leave it out (temperature may be set)"
            )
    if sampling.temperature == 0:
        raise ConfigError("temperature is 0: without chance there is nothing to compare; set it above 0")
    if model.is_quantised:
        raise ConfigError(
            "the weights are quantised blocks, which cannot be trained; load without quantized=True"
        )
    if engine.kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype = {engine.kv_cache_dtype!r} rounds keys that training has whole; leave it at 'auto'"
        )
    if engine.lora_adapters:
        raise ConfigError("rollouts are written by the weights that are trained; leave lora_adapters out")
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        raise ConfigError(
            "the model's RoPE base depends on how long an answer may become ('dynamic' scaling), which training "
            "does not know; use another scaling"
        )
