"""Tiny models for the tests of this room."""

from __future__ import annotations

from typing import Any

import torch

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model


def tiny_config(**changes: Any) -> ModelConfig:
    table: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    return ModelConfig.from_dict(table | changes)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Decoder:
    return create_model(tiny_config(**changes), dtype=dtype, numerics="fast", seed=seed)
