"""Tiny models of this room's tests: dense and mixture of experts, tied and untied, biases and windows."""

from __future__ import annotations

from typing import Any

from mainspring.formats.model_config import ModelConfig

_BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "tied": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "biased": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": True,
        "num_key_value_heads": 1,
    },
    "windowed": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7,
    },
    "moe": _MOE,
    "moe-sparse": _MOE | {"num_experts": 8, "num_experts_per_tok": 1},
    "moe-tied": _MOE | {"tie_word_embeddings": True, "norm_topk_prob": False},
}  # fmt: skip


def tiny(kind: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(_BASE | KINDS[kind] | changes)
