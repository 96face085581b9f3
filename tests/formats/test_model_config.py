"""Model configurations read like transformers reads them, write what it loads, and refuse what we cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mainspring.errors import CheckpointError, ConfigError, UnsupportedModelError
from mainspring.formats.model_config import KNOWN_ARCHITECTURES, ModelConfig

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}

# Every family, and within it every setting that changes the model.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-head-dim": ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 8}),
    "llama-linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 4}}),
    "llama-dynamic": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN | {"rope_theta": 5e5}}),
    "llama-yarn-all": (
        "LlamaForCausalLM",
        {
            "rope_parameters": YARN
            | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}
        },
    ),
    "llama-yarn-attention": ("LlamaForCausalLM", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 7}),
    "mistral-default-window": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen2-window-off": ("Qwen2ForCausalLM", {"sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("MixtralForCausalLM", EXPERTS | {"num_local_experts": 4, "sliding_window": 6}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 8}),
    "qwen3-moe-mixed": (
        "Qwen3MoeForCausalLM",
        EXPERTS
        | {
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "head_dim": 8,
        },
    ),
}


def config_dict(variant: str) -> dict[str, Any]:
    architecture, settings = VARIANTS[variant]
    model_type = getattr(transformers, architecture).config_class.model_type
    head_dim = {"head_dim": 4} if "qwen3" in variant else {}
    # A copy in depth: transformers changes the RoPE settings that it is given.
    merged = {**TINY, **head_dim, **settings, "architectures": [architecture], "model_type": model_type}
    return dict(json.loads(json.dumps(merged)))


def oracle(d: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    architecture = getattr(transformers, d["architectures"][0])
    config = architecture.config_class.from_dict(json.loads(json.dumps(d)))
    config._attn_implementation = "eager"
    return architecture(config).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_the_model_that_transformers_builds(variant: str) -> None:
    config = ModelConfig.from_dict(config_dict(variant))
    model = oracle(config_dict(variant))
    layers = model.model.layers
    attention = layers[0].self_attn

    def slides(layer: Any) -> int | None:
        holder = model.config if config.model_type in ("mistral", "mixtral") else layer.self_attn
        return getattr(holder, "sliding_window", None)

    assert config.sliding_windows == tuple(map(slides, layers))
    assert config.moe_layers == tuple("SparseMoe" in type(layer.mlp).__name__ for layer in layers)
    assert config.head_dim == attention.head_dim
    assert attention.q_proj.out_features == config.num_heads * config.head_dim
    assert attention.k_proj.out_features == config.num_kv_heads * config.head_dim
    assert config.qkv_bias == (attention.q_proj.bias is not None)
    assert config.output_bias == (attention.o_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm")
    if not config.moe_layers[0]:
        assert config.mlp_bias == (getattr(layers[0].mlp.gate_proj, "bias", None) is not None)
    assert config.rms_norm_eps == model.model.norm.variance_epsilon
    assert config.rope_theta == model.config.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == model.config.max_position_embeddings
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert config.bos_token_id == model.config.bos_token_id
    assert config.eos_token_ids == ((2,) if model.config.eos_token_id == 2 else ())
    if any(config.moe_layers):
        block = layers[config.moe_layers.index(True)].mlp
        assert block.gate.weight.shape[0] == config.num_experts
        assert block.gate.top_k == config.num_experts_per_token
        assert getattr(block.gate, "norm_topk_prob", True) == config.norm_topk_prob
        assert block.experts.down_proj.shape[-1] == config.moe_intermediate_size
        assert config.router_aux_loss_coef == model.config.router_aux_loss_coef


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_loads_in_transformers_to_the_same_model(variant: str) -> None:
    written = ModelConfig.from_dict(config_dict(variant)).to_dict()
    before, after = oracle(config_dict(variant)), oracle(written)
    after.load_state_dict(before.state_dict())
    tokens = torch.arange(3, 3 + 24)[None] % 32
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)
    assert torch.equal(before.model.rotary_emb.inv_freq, after.model.rotary_emb.inv_freq)
    assert before.model.rotary_emb.attention_scaling == after.model.rotary_emb.attention_scaling


@pytest.mark.parametrize("variant", VARIANTS)
def test_survives_a_round_trip_through_our_own_and_transformers_files(variant: str, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(config_dict(variant) | {"mystery": {"kept": [1, 2]}})
    written = config.to_dict()
    assert written["mystery"] == {"kept": [1, 2]}
    assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config
    transformers.AutoConfig.for_model(**json.loads(json.dumps(written))).save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["mystery"] == {"kept": [1, 2]}
    assert ModelConfig.from_file(tmp_path) == config


def test_old_and_new_spellings_are_the_same() -> None:
    old = config_dict("llama-llama3") | {"torch_dtype": "bfloat16"}
    rope = {**LLAMA3, "rope_theta": 500000.0}
    new = config_dict("llama") | {"dtype": "bfloat16", "rope_parameters": rope}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(old).dtype == "bfloat16"


def test_several_end_tokens_are_kept_in_order() -> None:
    config = ModelConfig.from_dict(config_dict("llama") | {"eos_token_id": [9, 4]})
    assert config.eos_token_ids == (9, 4)
    assert config.to_dict()["eos_token_id"] == [9, 4]


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel") as caught:
        ModelConfig.from_dict({**TINY, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    assert all(name in str(caught.value) for name in KNOWN_ARCHITECTURES)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        ModelConfig.from_dict({**TINY, "model_type": "bert"})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "0.25"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}}, "longrope"),
        ({"rope_scaling": {"type": "su"}}, "default, linear, dynamic, yarn, llama3"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping to 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "full_attention"),
        ({"torch_dtype": "float8_e4m3fn"}, "bfloat16"),
    ],
)
def test_features_that_we_would_get_wrong_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        ModelConfig.from_dict(config_dict("llama") | change)


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        ("llama", {"num_key_value_heads": 3}, ["4", "3"]),
        ("llama", {"hidden_size": 18}, ["18", "4"]),
        ("llama", {"head_dim": 5}, ["5", "even"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ("llama", {"vocab_size": "many"}, ["vocab_size", "many"]),
        ("llama", {"rms_norm_eps": 0}, ["rms_norm_eps", "0"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["0.5", "at least 1"]),
        ("llama", {"rope_scaling": {"type": "linear"}}, ["factor"]),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, ["1.0", "0.5"]),
        ("llama", {"model_type": "qwen2"}, ["LlamaForCausalLM", "qwen2"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window", "0"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "4"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, ["sliding_attention"]),
        ("mixtral", {"num_experts_per_tok": 5}, ["5", "4"]),
        ("qwen3-moe", {"mlp_only_layers": [4]}, ["4", "3"]),
    ],
)
def test_contradictions_are_refused_with_the_numbers(
    variant: str, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config_dict(variant) | change)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_size_is_named(key: str) -> None:
    d = config_dict("llama")
    del d[key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(d)


def test_a_config_that_no_file_could_say_cannot_be_made() -> None:
    d = ModelConfig.from_dict(config_dict("llama"))
    with pytest.raises(ConfigError, match="qk_norm"):
        ModelConfig(**{**vars(d), "qk_norm": True})
    with pytest.raises(ConfigError, match="sliding"):
        ModelConfig(**{**vars(d), "sliding_windows": (4, 4, 4, 4)})


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '"text"'])
def test_a_file_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_file(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        ModelConfig.from_file(tmp_path / "config.json")
