"""What a decoder is made of, read from and written to a Hugging Face `config.json`.

Six families: Llama (also SmolLM2), Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE. Both spellings are read: that of
transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`,
`layer_types`). Defaults of absent keys are those of transformers 5's configuration classes. What Mainspring would
silently get wrong is refused here, before a weight is read.

Two settings only matter to training in transformers and are carried but not applied: `attention_dropout` and
Mixtral's `router_jitter_noise`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mainspring.errors import CheckpointError, ConfigError, UnsupportedModelError
from mainspring.formats._fields import (
    read_bool,
    read_float,
    read_int,
    read_optional_int,
    read_str,
    read_token_ids,
)
from mainspring.formats.rope_scaling import RopeScaling, read_rope, write_rope

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class _Family:
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


_FAMILIES = {
    family.architecture: family
    for family in (
        _Family(
            "LlamaForCausalLM", "llama", None, 2048, bos_token_id=1, eos_token_id=2, attention_bias_key=True
        ),
        _Family("MistralForCausalLM", "mistral", 8, 131072, bos_token_id=1, eos_token_id=2),
        _Family("Qwen2ForCausalLM", "qwen2", 32, 32768),
        _Family("Qwen3ForCausalLM", "qwen3", 32, 32768, head_dim=128, attention_bias_key=True, qk_norm=True),
        _Family(
            "MixtralForCausalLM",
            "mixtral",
            8,
            131072,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _Family("Qwen3MoeForCausalLM", "qwen3_moe", 4, 32768, attention_bias_key=True, qk_norm=True),
    )
}
KNOWN_ARCHITECTURES: tuple[str, ...] = tuple(_FAMILIES)

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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape and constants. Values are checked on construction (ConfigError, UnsupportedModelError).

    `sliding_windows` has one entry a layer: None for full attention, else the number of keys that a query sees,
    itself included. `moe_layers` says of each layer whether it is a mixture of experts. `intermediate_size` is the
    width of dense MLPs, `moe_intermediate_size` that of each expert. `extra` is the dictionary that this was read
    from: its unknown keys survive `to_dict`; it takes no part in comparisons.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    model_type: str = ""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    moe_layers: tuple[bool, ...] = ()
    router_aux_loss_coef: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        family = _family(self.architecture, self.model_type or None)
        # A frozen dataclass fills its derived defaults through object.__setattr__, once, here.
        object.__setattr__(self, "model_type", family.model_type)
        object.__setattr__(self, "sliding_windows", tuple(self.sliding_windows) or (None,) * self.num_layers)
        object.__setattr__(self, "moe_layers", tuple(self.moe_layers) or (False,) * self.num_layers)
        self._check_sizes()
        self._check_layers()
        self._check_expressible(family)

    def _check_sizes(self) -> None:
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        )
        for name in (*positive, "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}: rotary embeddings need an even number")
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic" and self.head_dim == 2:
            raise ConfigError("head_dim is 2: dynamic RoPE scaling needs at least 4")
        if self.model_type == "llama" and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"dtype {self.dtype!r} is not supported; the known ones are: {', '.join(DTYPES)}"
            )

    def _check_layers(self) -> None:
        for name in ("sliding_windows", "moe_layers"):
            if len(getattr(self, name)) != self.num_layers:
                raise ConfigError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_layers} layers"
                )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise ConfigError(f"sliding_windows {self.sliding_windows} must be None or at least 1")
        if any(self.moe_layers):
            if self.moe_intermediate_size < 1:
                raise ConfigError(
                    f"moe_intermediate_size is {self.moe_intermediate_size}: it must be at least 1"
                )
            if not 1 <= self.num_experts_per_token <= self.num_experts:
                raise ConfigError(
                    f"num_experts_per_token is {self.num_experts_per_token}: it must lie between 1 and "
                    f"num_experts {self.num_experts}"
                )

    def _check_expressible(self, family: _Family) -> None:
        """Refuses combinations that no config.json of the family can say, so that every config can be saved."""
        expected_bias = self.output_bias if family.attention_bias_key else family.model_type == "qwen2"
        problem = None
        if self.qk_norm != family.qk_norm:
            problem = f"qk_norm={self.qk_norm}"
        elif self.qkv_bias != expected_bias or (self.output_bias and not family.attention_bias_key):
            problem = f"qkv_bias={self.qkv_bias} with output_bias={self.output_bias}"
        elif self.mlp_bias and family.model_type != "llama":
            problem = f"mlp_bias={self.mlp_bias}"
        elif len({window for window in self.sliding_windows if window is not None}) > 1:
            problem = f"sliding windows of different sizes {self.sliding_windows}"
        elif family.model_type not in ("qwen2", "qwen3") and len(set(self.sliding_windows)) > 1:
            problem = f"sliding windows in some layers only {self.sliding_windows}"
        elif family.model_type == "llama" and any(self.sliding_windows):
            problem = f"sliding windows {self.sliding_windows}"
        elif family.model_type == "mixtral" and not (
            all(self.moe_layers)
            and self.norm_topk_prob
            and self.moe_intermediate_size == self.intermediate_size
        ):
            problem = "a layer without experts, unnormalised routing weights, or experts of another width than the MLP"
        elif family.model_type not in ("mixtral", "qwen3_moe") and any(self.moe_layers):
            problem = "mixture-of-experts layers"
        if problem is not None:
            raise ConfigError(f"{family.architecture} cannot have {problem}")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a `config.json`, or the one inside a directory. Raises CheckpointError if it is missing or not JSON."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read the model configuration {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"the model configuration {path} is not valid JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(
                f"the model configuration {path} holds a {type(parsed).__name__}, not an object"
            )
        return cls.from_dict(parsed)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face configuration of a known architecture (`KNOWN_ARCHITECTURES`).

        Raises UnsupportedModelError for an unknown architecture or feature, ConfigError for missing, mistyped or
        contradictory values.
        """
        family = _find_family(d)
        _refuse_unsupported(d)
        num_layers = read_int(d, "num_hidden_layers", minimum=1)
        num_heads = read_int(d, "num_attention_heads", minimum=1)
        hidden_size = read_int(d, "hidden_size", minimum=1)
        intermediate_size = read_int(d, "intermediate_size", minimum=1)
        max_positions = read_int(d, "max_position_embeddings", family.max_position_embeddings, minimum=1)
        theta, scaling = read_rope(d, family.rope_theta, max_positions)
        attention_bias = family.attention_bias_key and read_bool(d, "attention_bias", False)
        bos = read_token_ids(d, "bos_token_id", family.bos_token_id)
        return cls(
            architecture=family.architecture,
            model_type=family.model_type,
            vocab_size=read_int(d, "vocab_size", minimum=1),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_read_kv_heads(d, family, num_heads),
            head_dim=_read_head_dim(d, family, hidden_size, num_heads),
            max_position_embeddings=max_positions,
            rms_norm_eps=read_float(d, "rms_norm_eps", family.rms_norm_eps, above=0.0),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=read_bool(d, "tie_word_embeddings", False),
            qkv_bias=attention_bias or family.model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=family.model_type == "llama" and read_bool(d, "mlp_bias", False),
            qk_norm=family.qk_norm,
            sliding_windows=_read_windows(d, family, num_layers),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=read_token_ids(d, "eos_token_id", family.eos_token_id),
            dtype=read_str(d, "dtype", read_str(d, "torch_dtype", "float32")).removeprefix("torch."),
            extra=copy.deepcopy(dict(d)),
            **_read_experts(d, family, num_layers, intermediate_size),
        )

    def to_dict(self) -> dict[str, Any]:
        """A Hugging Face configuration that transformers 5 loads to the same model; unknown keys of `extra` stay."""
        out = copy.deepcopy(dict(self.extra))
        out.pop("torch_dtype", None)
        out.update(
            architectures=[self.architecture],
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_act="silu",
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.tie_word_embeddings,
            bos_token_id=self.bos_token_id,
            eos_token_id=_one_or_list(self.eos_token_ids),
            dtype=self.dtype,
        )
        write_rope(out, self.rope_theta, self.rope_scaling)
        if _FAMILIES[self.architecture].attention_bias_key:
            out["attention_bias"] = self.output_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        self._write_windows(out)
        self._write_experts(out)
        return out

    def _write_windows(self, out: dict[str, Any]) -> None:
        window = next((w for w in self.sliding_windows if w is not None), None)
        if self.model_type in ("mistral", "mixtral"):
            out["sliding_window"] = window
        elif self.model_type in ("qwen2", "qwen3", "qwen3_moe"):
            out["use_sliding_window"] = window is not None
            out["sliding_window"] = window if window is not None else self.extra.get("sliding_window")
        out.pop("layer_types", None)
        if self.model_type in ("qwen2", "qwen3"):
            out["layer_types"] = [
                "full_attention" if w is None else "sliding_attention" for w in self.sliding_windows
            ]

    def _write_experts(self, out: dict[str, Any]) -> None:
        if self.model_type not in ("mixtral", "qwen3_moe"):
            return
        out["num_experts_per_tok"] = self.num_experts_per_token
        out["router_aux_loss_coef"] = self.router_aux_loss_coef
        if self.model_type == "mixtral":
            out["num_local_experts"] = self.num_experts
            return
        out.pop("num_local_experts", None)
        out.update(
            num_experts=self.num_experts,
            moe_intermediate_size=self.moe_intermediate_size,
            norm_topk_prob=self.norm_topk_prob,
            # Whatever rule made the layers, the list alone says the same.
            decoder_sparse_step=1,
            mlp_only_layers=[i for i, sparse in enumerate(self.moe_layers) if not sparse],
        )


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def _family(architecture: object, model_type: object) -> _Family:
    family = _FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported; the known ones are: {', '.join(KNOWN_ARCHITECTURES)}"
        )
    if model_type is not None and model_type != family.model_type:
        raise ConfigError(
            f"architecture {architecture} contradicts model_type {model_type!r}: {family.model_type!r}?"
        )
    return family


def _find_family(d: Mapping[str, Any]) -> _Family:
    architectures, model_type = d.get("architectures"), d.get("model_type")
    if isinstance(architectures, list) and architectures:
        return _family(architectures[0], model_type)
    by_type = {family.model_type: family for family in _FAMILIES.values()}
    if isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    raise UnsupportedModelError(
        f"the model configuration has architectures {architectures!r} and model_type {model_type!r}; "
        f"the known architectures are: {', '.join(KNOWN_ARCHITECTURES)}"
    )


def _refuse_unsupported(d: Mapping[str, Any]) -> None:
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


def _read_kv_heads(d: Mapping[str, Any], family: _Family, num_heads: int) -> int:
    # An explicit null means one key head per query head, an absent key the family's default.
    if "num_key_value_heads" in d:
        return read_int(d, "num_key_value_heads", num_heads, minimum=1)
    return family.num_kv_heads or num_heads


def _read_head_dim(d: Mapping[str, Any], family: _Family, hidden_size: int, num_heads: int) -> int:
    explicit = read_optional_int(d, "head_dim", 1) or family.head_dim
    if explicit is not None:
        return explicit
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and head_dim is not given"
        )
    return hidden_size // num_heads


def _read_windows(d: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
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


def _read_window(d: Mapping[str, Any], family: _Family) -> int | None:
    if family.model_type == "llama":
        return None
    if family.model_type.startswith("qwen") and not read_bool(d, "use_sliding_window", False):
        return None
    if "sliding_window" not in d:
        return None if family.model_type == "mixtral" else 4096
    return read_optional_int(d, "sliding_window", 1)


def _read_experts(
    d: Mapping[str, Any], family: _Family, num_layers: int, intermediate_size: int
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
