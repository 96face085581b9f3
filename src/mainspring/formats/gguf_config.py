"""Turns a GGUF file's metadata into a Hugging Face configuration, and its tensor names into Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from mainspring.errors import CheckpointError, UnsupportedModelError
from mainspring.formats.gguf_header import GGUFHeader
from mainspring.formats.model_config import ModelConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192  # the same in every Llama 3.1 to 3.3 release

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERT_PARTS = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
# Derived data that a Hugging Face checkpoint does not hold (rope_freqs is read by `_llama3_scaling`).
_SKIPPED = ("rope_freqs.weight",)


@dataclass(frozen=True)
class TensorSource:
    """Where a Hugging Face tensor comes from: a GGUF tensor, which expert of it, and how many heads to un-permute."""

    gguf_name: str
    expert: int | None = None
    rope_heads: int = 0  # 0: rows are in Hugging Face's order already


def read_config(header: GGUFHeader, dtype: str) -> ModelConfig:
    """The configuration of the model in `header`, with `dtype` as its weights' type.

    Raises UnsupportedModelError for an unknown architecture or RoPE setting, CheckpointError for missing keys.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF architecture {architecture!r} of {header.path} is not supported; "
            f"the known ones are: {', '.join(ARCHITECTURES)}"
        )
    settings = _Settings(header, architecture)
    heads = max(1, settings.integer("attention.head_count"))
    layers = settings.integer("block_count")
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{header.path} announces {layers} layers, but has {len(header.tensors)} tensors only"
        )
    hidden = settings.integer("embedding_length")
    head_dim = settings.integer(
        "attention.key_length", settings.integer("rope.dimension_count", hidden // heads)
    )
    if settings.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{header.path} rotates only part of each head: that is not supported")
    config: dict[str, Any] = {
        "vocab_size": _vocab_size(header),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": settings.integer("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_ids(metadata) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "rope_parameters": {**_rope(settings), "rope_theta": settings.number("rope.freq_base", 10000.0)},
        "dtype": dtype,
    }
    config.update(_family_settings(settings, architecture))
    return ModelConfig.from_dict(config)


def eos_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a generation: the end of the text, and of a turn where that differs."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return list(dict.fromkeys(metadata[key] for key in keys if isinstance(metadata.get(key), int)))


def tensor_sources(header: GGUFHeader, config: ModelConfig) -> dict[str, TensorSource]:
    """Hugging Face's name of every tensor and its source; raises UnsupportedModelError for an unknown tensor."""
    sources: dict[str, TensorSource] = {}
    for name in header.tensors:
        if name not in _SKIPPED:
            sources.update(_sources_of(name, config, header))
    return sources


class _Settings:
    """The metadata under one architecture's prefix."""

    def __init__(self, header: GGUFHeader, architecture: str) -> None:
        self.header = header
        self._prefix = architecture + "."

    def get(self, key: str) -> Any:
        return self.header.metadata.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # given per layer, the same in all
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, value, "a number")
        # Numbers are stored in 32 bits: the shortest decimal that rounds to them is what their author wrote.
        return float(str(np.float32(value)))

    def _refuse(self, key: str, value: object, kind: str) -> NoReturn:
        raise CheckpointError(f"{self.header.path} has {self._prefix}{key} = {value!r}: it must be {kind}")


def _vocab_size(header: GGUFHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"the GGUF file {header.path} has no tensor 'token_embd.weight'")
    return embedding.shape[0]


def _family_settings(settings: _Settings, architecture: str) -> dict[str, Any]:
    header = settings.header
    experts = settings.integer("expert_count", 0)
    window = settings.integer("attention.sliding_window", 0)
    if architecture == "qwen3moe":
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": settings.integer("feed_forward_length", 6144),
            "num_experts": experts,
            "num_experts_per_tok": settings.integer("expert_used_count"),
            "moe_intermediate_size": settings.integer("expert_feed_forward_length"),
            "norm_topk_prob": True,  # llama.cpp normalises always, and no other Qwen3-MoE exists
        }
    out: dict[str, Any] = {"intermediate_size": settings.integer("feed_forward_length")}
    if architecture in ("qwen2", "qwen3"):
        if window:
            raise UnsupportedModelError(
                f"{header.path} has a sliding window of {window}: unsupported for {architecture}"
            )
        return out | {
            "architectures": ["Qwen2ForCausalLM" if architecture == "qwen2" else "Qwen3ForCausalLM"]
        }
    if experts:
        used = settings.integer("expert_used_count")
        out |= {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": experts,
            "num_experts_per_tok": used,
        }
        return out | {"sliding_window": window or None}
    if window:
        return out | {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return out | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def _rope(settings: _Settings) -> dict[str, Any]:
    kind = settings.get("rope.scaling.type")
    frequencies = settings.header.tensors.get("rope_freqs.weight")
    if frequencies is not None:
        return _llama3_scaling(settings, frequencies.rows.reshape(-1).view(np.float32))
    if kind in (None, "none"):
        return {"rope_type": "default"}
    factor = settings.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    adjusted = [key for key in ("attn_factor", "yarn_log_multiplier") if settings.get(f"rope.scaling.{key}")]
    if kind == "yarn" and not adjusted:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": settings.integer("rope.scaling.original_context_length"),
            "beta_fast": settings.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": settings.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise UnsupportedModelError(
        f"{settings.header.path} scales RoPE by {kind!r} {adjusted or ''}: supported are linear, yarn and llama3"
    )


def _llama3_scaling(settings: _Settings, divisors: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Any]:
    """Recovers llama3 scaling from the divisors of each frequency, which is all that GGUF stores of it."""
    factor = float(divisors.max())
    theta = settings.number("rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(divisors.size) / divisors.size)
    blend = (_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    middle = 1 / ((1 - blend) / factor + blend)
    expected = np.where(wavelengths > _LLAMA3_CONTEXT / _LLAMA3_LOW, factor, middle)
    expected = np.where(wavelengths < _LLAMA3_CONTEXT / _LLAMA3_HIGH, 1.0, expected)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{settings.header.path} has RoPE frequencies that are not those of Llama 3.1's scaling: unsupported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _sources_of(
    name: str, config: ModelConfig, header: GGUFHeader
) -> Iterable[tuple[str, TensorSource]] | dict[str, TensorSource]:
    if name in _GLOBAL_NAMES:
        return {_GLOBAL_NAMES[name]: TensorSource(name)}
    match = re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)", name)
    if match is None:
        raise UnsupportedModelError(f"{header.path} has a tensor {name!r}, which is not known")
    layer, part, expert, kind = match.groups()
    prefix = f"model.layers.{layer}"
    if part in _LAYER_NAMES and expert is None:
        # llama.cpp interleaves the rotated halves of Llama's heads, not of Qwen's.
        rotated = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part, 0)
        heads = rotated if header.metadata["general.architecture"] == "llama" else 0
        return {f"{prefix}.{_LAYER_NAMES[part]}.{kind}": TensorSource(name, rope_heads=heads)}
    if config.model_type in _EXPERT_PARTS:
        block, parts = _EXPERT_PARTS[config.model_type]
        which = re.fullmatch(r"ffn_(gate|up|down)(_exps)?", part)
        if part == "ffn_gate_inp":
            return {f"{prefix}.{block}.gate.{kind}": TensorSource(name)}
        if which is not None and (expert is None) == (which[2] is not None):
            # A file may announce any number of experts: _check_shapes compares the two.
            experts = range(header.tensors[name].shape[0]) if expert is None else [int(expert)]
            return {
                f"{prefix}.{block}.experts.{e}.{parts[which[1]]}.{kind}": TensorSource(
                    name, e if expert is None else None
                )
                for e in experts
            }
    raise UnsupportedModelError(
        f"{header.path} has a tensor {name!r}, which is not known in {config.architecture}"
    )
