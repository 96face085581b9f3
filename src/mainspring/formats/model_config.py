"""What a decoder is made of, read from and written to a Hugging Face `config.json`.

Six families: Llama (also SmolLM2), Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE. Both spellings are
read: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5
(`rope_parameters`, `dtype`, `layer_types`). Defaults of absent keys are those of transformers 5's
configuration classes. What Mainspring would silently get wrong is refused here, before a weight is read.

Two settings matter only to training in transformers and are carried but not applied: `attention_dropout`
and Mixtral's `router_jitter_noise`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mainspring.errors import CheckpointError, ConfigError, UnsupportedModelError
from mainspring.formats._families import (
    FAMILIES,
    KNOWN_ARCHITECTURES,
    Family,
    find_family,
    named_family,
    read_experts,
    read_head_dim,
    read_kv_heads,
    read_windows,
    refuse_unsupported,
)
from mainspring.formats._fields import read_bool, read_float, read_int, read_str, read_token_ids
from mainspring.formats.rope_scaling import RopeScaling, read_rope, write_rope

__all__ = ["DTYPES", "KNOWN_ARCHITECTURES", "ModelConfig", "RopeScaling"]

_MAX_LAYERS = 10_000  # far beyond any model: a larger number is a damaged file
_MAX_EXPERTS = 4_096  # of a layer: likewise

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape and constants, checked on construction (ConfigError, UnsupportedModelError).

    `sliding_windows` has one entry a layer: None for full attention, else the number of keys that a query
    sees, itself included. `moe_layers` says of each layer whether it is a mixture of experts.
    `intermediate_size` is the width of dense MLPs, `moe_intermediate_size` that of each expert. `extra` is
    the dictionary that this was read from: its unknown keys survive `to_dict`; it is not compared.
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
        family = named_family(self.architecture, self.model_type or None)
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
            if self.num_experts > _MAX_EXPERTS:
                raise ConfigError(f"num_experts is {self.num_experts}: at most {_MAX_EXPERTS} are supported")
            if not 1 <= self.num_experts_per_token <= self.num_experts:
                raise ConfigError(
                    f"num_experts_per_token is {self.num_experts_per_token}: it must lie between 1 and "
                    f"num_experts {self.num_experts}"
                )

    def _check_expressible(self, family: Family) -> None:
        """Refuses what no config.json of the family can say, so that every configuration can be saved."""
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
            problem = "dense layers, unnormalised routing or experts of a width other than the MLP's"
        elif family.model_type not in ("mixtral", "qwen3_moe") and any(self.moe_layers):
            problem = "mixture-of-experts layers"
        if problem is not None:
            raise ConfigError(f"{family.architecture} cannot have {problem}")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a `config.json` or the one inside a directory; CheckpointError if missing or not JSON."""
        return cls.from_dict(read_config(path))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face configuration of a known architecture (`KNOWN_ARCHITECTURES`).

        Raises UnsupportedModelError for an unknown architecture or feature, ConfigError for missing,
        mistyped or contradictory values.
        """
        family = find_family(d)
        refuse_unsupported(d)
        num_layers = read_int(d, "num_hidden_layers", minimum=1)
        if num_layers > _MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers is {num_layers}: at most {_MAX_LAYERS} are supported")
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
            num_kv_heads=read_kv_heads(d, family, num_heads),
            head_dim=read_head_dim(d, family, hidden_size, num_heads),
            max_position_embeddings=max_positions,
            rms_norm_eps=read_float(d, "rms_norm_eps", family.rms_norm_eps, above=0.0),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=read_bool(d, "tie_word_embeddings", False),
            qkv_bias=attention_bias or family.model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=family.model_type == "llama" and read_bool(d, "mlp_bias", False),
            qk_norm=family.qk_norm,
            sliding_windows=read_windows(d, family, num_layers),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=read_token_ids(d, "eos_token_id", family.eos_token_id),
            dtype=read_str(d, "dtype", read_str(d, "torch_dtype", "float32")).removeprefix("torch."),
            extra=copy.deepcopy(dict(d)),
            **read_experts(d, family, num_layers, intermediate_size),
        )

    def to_dict(self) -> dict[str, Any]:
        """A configuration that transformers 5 loads to the same model; unknown keys of `extra` stay."""
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
        if FAMILIES[self.architecture].attention_bias_key:
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


def read_config(path: str | Path) -> dict[str, Any]:
    """The object in a `config.json`, or in the one inside a directory; CheckpointError if missing or not JSON."""
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
    return parsed


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)
