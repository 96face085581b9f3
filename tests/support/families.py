"""Tiny random models of every family, as transformers and as Mainspring configure them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mainspring.formats.model_config import ModelConfig

_BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Family:
    """A name for the test's id, transformers' model type, and what differs from the base configuration."""

    name: str
    model_type: str
    overrides: dict[str, Any]


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_theta": 10000.0, **parameters}}


FAMILIES = [
    Family("llama", "llama", {}),
    Family(
        "llama-biases-tied", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    Family("mistral-window", "mistral", {"sliding_window": 7, "head_dim": 16}),
    Family(
        "qwen2-some-windows",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Family("qwen3", "qwen3", {"head_dim": 16}),
    Family("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "qwen3-moe",
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "head_dim": 16,
            "norm_topk_prob": False,
        },
    ),
    Family("rope-linear", "llama", _rope(rope_type="linear", factor=2.0)),
    Family("rope-dynamic", "llama", _rope(rope_type="dynamic", factor=2.0)),
    Family("rope-yarn", "llama", _rope(**_YARN)),
    Family("rope-llama3", "llama", _rope(**_LLAMA3)),
]


def transformers_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model; norms and biases are random as well, so that none can be lost unnoticed."""
    config = AutoConfig.for_model(family.model_type, **{**_BASE, **family.overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def model_config(family: Family) -> ModelConfig:
    """The same configuration, read from what transformers would save."""
    config = AutoConfig.for_model(family.model_type, **{**_BASE, **family.overrides})
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config)).__name__
    return ModelConfig.from_dict({**config.to_dict(), "architectures": [architecture]})
