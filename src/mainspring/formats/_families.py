"""The model families: their architectures, the defaults of absent keys, and the rules of their layers.

Defaults and rules are those of transformers 5.17's configuration and modelling files of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mainspring.errors import ConfigError, UnsupportedModelError
from mainspring.formats._fields import read_bool, read_float, read_int, read_optional_int


@dataclass(frozen=True)
class Family:
    """One architecture and the defaults that transformers gives its absent keys."""

    architecture: str
    model_type: str
    num_kv_heads: int | None  # None: as many as query heads
    max_position_embeddings: int
    head_dim: int | None = None  # None: hidden_size / num_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    attention_bias_key: bool = False  # `attention_bias` sets the biases of q, k, v and o
    qk_norm: bool = False


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM", "llama", None, 2048, bos_token_id=1, eos_token_id=2, attention_bias_key=True
        ),
        Family("MistralForCausalLM", "mistral", 8, 131072, bos_token_id=1, eos_token_id=2),
        Family("Qwen2ForCausalLM", "qwen2", 32, 32768),
        Family("Qwen3ForCausalLM", "qwen3", 32, 32768, head_dim=128, attention_bias_key=True, qk_norm=True),
        Family(
            "MixtralForCausalLM",
            "mixtral",
            8,
            131072,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            bos_token_id=1,
            eos_token_id=2,
        ),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", 4, 32768, attention_bias_key=True, qk_norm=True),
    )
}
KNOWN_ARCHITECTURES: tuple[str, ...] = tuple(FAMILIES)

# Settings of related models that change the computation, with the value at which they change nothing.
_REFUSED: Mapping[str, object] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "clip_qkv": None,
    "attention_chunk_size": None,
    "no_rope_layers": None,
    "alibi": False,
    "quantization_config": None,
    "per_layer_config": None,
    "shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
    "attention_sinks": None,
}


def named_family(architecture: object, model_type: object) -> Family:
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported; "
            f"the known ones are: {', '.join(KNOWN_ARCHITECTURES)}"
        )
    if model_type is not None and model_type != family.model_type:
        raise ConfigError(
            f"architecture {architecture} contradicts model_type {model_type!r}: {family.model_type!r}?"
        )
    return family


def find_family(d: Mapping[str, Any]) -> Family:
    architectures, model_type = d.get("architectures"), d.get("model_type")
    if isinstance(architectures, list) and architectures:
        return named_family(architectures[0], model_type)
    by_type = {family.model_type: family for family in FAMILIES.values()}
    if isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    raise UnsupportedModelError(
        f"the model configuration has architectures {architectures!r} and model_type {model_type!r}; "
        f"the known architectures are: {', '.join(KNOWN_ARCHITECTURES)}"
    )


def refuse_unsupported(d: Mapping[str, Any]) -> None:
    act = d.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act is {act!r}: only 'silu' is supported")
    for key, neutral in _REFUSED.items():
        value = d.get(key)
        if value is not None and value != neutral and value != {}:
            shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            raise UnsupportedModelError(
                f"the model configuration sets {key} to {shown}, which is not supported"
            )


def read_kv_heads(d: Mapping[str, Any], family: Family, num_heads: int) -> int:
    # An explicit null means one key head per query head, an absent key the family's default.
    if "num_key_value_heads" in d:
        return read_int(d, "num_key_value_heads", num_heads, minimum=1)
    return family.num_kv_heads or num_heads


def read_head_dim(d: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
    explicit = read_optional_int(d, "head_dim", 1) or family.head_dim
    if explicit is not None:
        return explicit
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
            "and head_dim is not given"
        )
    return hidden_size // num_heads


def read_windows(d: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    """One window a layer, by the rules of each family in transformers 5.17."""
    layer_types = d.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or len(layer_types) != num_layers):
        raise ConfigError(
            f"layer_types is {layer_types!r}: it must list one type for each of {num_layers} layers"
        )
    for kind in layer_types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"layer type {kind!r} is not supported; the known ones are: full_attention, sliding_attention"
            )
    window = _read_window(d, family)
    if family.model_type in ("qwen2", "qwen3"):
        first = read_int(d, "max_window_layers", 28)
        slides = [i >= first and window is not None for i in range(num_layers)]
        if layer_types is not None:
            slides = [kind == "sliding_attention" for kind in layer_types]
        if any(slides) and window is None:
            raise ConfigError(
                "layer_types asks for sliding_attention, but use_sliding_window or sliding_window is not set"
            )
        return tuple(window if slide else None for slide in slides)
    # The other families slide in all layers or in none; transformers ignores layer_types there.
    expected = "full_attention" if window is None else "sliding_attention"
    if layer_types is not None and any(kind != expected for kind in layer_types):
        raise UnsupportedModelError(
            f"layer_types of {family.architecture} must all be {expected!r} (sliding_window is {window}), "
            f"got {sorted(set(layer_types))}"
        )
    return (window,) * num_layers


def _read_window(d: Mapping[str, Any], family: Family) -> int | None:
    if family.model_type == "llama":
        return None
    if family.model_type.startswith("qwen") and not read_bool(d, "use_sliding_window", False):
        return None
    if "sliding_window" not in d:
        return None if family.model_type == "mixtral" else 4096
    return read_optional_int(d, "sliding_window", 1)


def read_experts(
    d: Mapping[str, Any], family: Family, num_layers: int, intermediate_size: int
) -> dict[str, Any]:
    """The constructor's arguments for the experts of a mixture; none for a dense family."""
    if family.model_type == "mixtral":
        experts = read_int(d, "num_local_experts", read_int(d, "num_experts", 8), minimum=1)
        moe_layers = [True] * num_layers
        width, per_token, norm = intermediate_size, 2, True
    elif family.model_type == "qwen3_moe":
        experts = read_int(d, "num_experts", read_int(d, "num_local_experts", 128))
        step = read_int(d, "decoder_sparse_step", 1, minimum=1)
        dense = d.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(i not in range(num_layers) for i in dense):
            raise ConfigError(f"mlp_only_layers is {dense!r}: it must list layers from 0 to {num_layers - 1}")
        moe_layers = [i not in dense and experts > 0 and (i + 1) % step == 0 for i in range(num_layers)]
        width, per_token = read_int(d, "moe_intermediate_size", 768, minimum=1), 8
        norm = read_bool(d, "norm_topk_prob", False)
    else:
        return {}
    return {
        "num_experts": experts,
        "num_experts_per_token": read_int(d, "num_experts_per_tok", per_token, minimum=1),
        "moe_intermediate_size": width,
        "norm_topk_prob": norm,
        "moe_layers": tuple(moe_layers),
        "router_aux_loss_coef": read_float(d, "router_aux_loss_coef", 0.001),
    }
