"""Which rows of which fused parameter carry which Hugging Face tensor name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from mainspring.formats.model_config import ModelConfig


@dataclass(frozen=True)
class Part:
    """Hugging Face's `name` is rows `start:stop` (all if stop is None) of `parameter`, of expert `expert` if 3-D."""

    name: str
    parameter: str
    start: int = 0
    stop: int | None = None
    expert: int | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """The part's own view of the fused parameter: writing to it writes to the parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix if self.stop is None else matrix[self.start : self.stop]


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every tensor of the checkpoint once; the tied output embedding is left out."""
    yield Part("model.embed_tokens.weight", "embedding")
    for layer in range(config.num_layers):
        yield from _layer_parts(config, layer)
    yield Part("model.norm.weight", "norm.weight")
    if not config.tie_word_embeddings:
        yield Part("lm_head.weight", "output_embedding")


def _layer_parts(config: ModelConfig, layer: int) -> Iterator[Part]:
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    yield Part(f"{theirs}.input_layernorm.weight", f"{ours}.input_norm.weight")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = (("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv))
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        for name, start, stop in fused:
            yield Part(f"{theirs}.self_attn.{name}.{kind}", f"{ours}.attention.qkv.{kind}", start, stop)
    for kind in ("weight", "bias") if config.output_bias else ("weight",):
        yield Part(f"{theirs}.self_attn.o_proj.{kind}", f"{ours}.attention.output.{kind}")
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Part(f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{name}.weight")
    yield Part(f"{theirs}.post_attention_layernorm.weight", f"{ours}.post_attention_norm.weight")
    if config.moe_layers[layer]:
        yield from _expert_parts(config, theirs, ours)
        return
    inner = config.intermediate_size
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        yield Part(f"{theirs}.mlp.gate_proj.{kind}", f"{ours}.mlp.gate_up.{kind}", 0, inner)
        yield Part(f"{theirs}.mlp.up_proj.{kind}", f"{ours}.mlp.gate_up.{kind}", inner, 2 * inner)
        yield Part(f"{theirs}.mlp.down_proj.{kind}", f"{ours}.mlp.down.{kind}")


def _expert_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    mixtral = config.model_type == "mixtral"
    block = f"{theirs}.block_sparse_moe" if mixtral else f"{theirs}.mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    inner = config.moe_intermediate_size
    yield Part(f"{block}.gate.weight", f"{ours}.mlp.router.weight")
    for e in range(config.num_experts):
        expert = f"{block}.experts.{e}"
        yield Part(f"{expert}.{gate}.weight", f"{ours}.mlp.gate_up", 0, inner, e)
        yield Part(f"{expert}.{up}.weight", f"{ours}.mlp.gate_up", inner, 2 * inner, e)
        yield Part(f"{expert}.{down}.weight", f"{ours}.mlp.down", expert=e)
