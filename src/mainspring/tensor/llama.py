"""Decoders of the Llama family from Hugging Face directories, computed by the C++ framework alone.

model = LlamaModel.from_directory("path", dtype=mt.bfloat16)
logits = model(mt.tensor([[1, 2, 3]]))                     # [B, T, vocabulary]
for token in model.generate([1, 2, 3], max_tokens=20): ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mainspring.errors import UnsupportedModelError
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.rope_scaling import RopeScaling
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Generator, Tensor, ValueOutOfRangeError, dtype
from mainspring.tensor.checkpoint_file import load_tensor
from mainspring.tensor.grad_mode import no_grad
from mainspring.tensor.nn.layers import Embedding, RMSNorm, _uniform
from mainspring.tensor.nn.module import Module, ModuleList
from mainspring.tensor.nn.transformer import KeyValueCache, RotaryAngles, TransformerBlock


class LlamaModel(Module):
    """Token ids [B, T] to logits [B, T, vocabulary].

    Raises:
        UnsupportedModelError: a mixture of experts, a sliding window, norms of queries and keys, a bias in the MLP,
            or a RoPE scaling other than linear and llama3.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: dtype = mt.float32,
        generator: Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        _check(config)
        self.config = config
        frequencies = _frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
        angles = RotaryAngles(config.head_dim, frequencies=frequencies)
        self.embedding = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, generator=generator, initialise=initialise
        )
        self.layers = ModuleList(
            [
                TransformerBlock(
                    config.hidden_size,
                    config.intermediate_size,
                    config.num_heads,
                    config.num_kv_heads,
                    config.head_dim,
                    angles=angles,
                    eps=config.rms_norm_eps,
                    qkv_bias=config.qkv_bias,
                    output_bias=config.output_bias,
                    dtype=dtype,
                    generator=generator,
                    initialise=initialise,
                )
                for _ in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        shape = (config.vocab_size, config.hidden_size)
        self.output_embedding = (
            self.embedding.weight
            if config.tie_word_embeddings
            else _uniform(shape, config.hidden_size**-0.5, dtype, generator, initialise)
        )

    @classmethod
    def from_directory(cls, path: str | Path, dtype: dtype = mt.float32) -> LlamaModel:
        """Reads config.json and the safetensors files of a Hugging Face directory.

        Raises:
            CheckpointError: a missing or damaged file, or one that lacks a tensor.
        """
        config = ModelConfig.from_file(Path(path) / "config.json")
        model = cls(config, dtype=dtype, initialise=False)
        state = model.state_dict()
        reader = CheckpointReader(path)
        with no_grad():
            for ours, theirs in _names(config):
                parts = [load_tensor(reader, name).to(dtype) for name in theirs]
                state[ours].copy_(mt.cat(parts) if len(parts) > 1 else parts[0])
        return model

    def forward(
        self, ids: Tensor, caches: Sequence[KeyValueCache] | None = None, last_only: bool = False
    ) -> Tensor:
        """With `caches`, ids follow what they hold. `last_only` gives [B, 1, vocabulary], of the last position."""
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, caches[i] if caches else None)
        if last_only:
            x = x[:, -1:]
        return mt.linear(self.norm(x), self.output_embedding)

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Empty caches for that many sequences of at most `capacity` tokens."""
        c = self.config
        kind = self.embedding.weight.dtype
        return [KeyValueCache(batch, capacity, c.num_kv_heads, c.head_dim, kind) for _ in range(c.num_layers)]

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        generator: Generator | None = None,
    ) -> Iterator[int]:
        """Yields token ids up to and without the end of the sequence.

        Raises:
            ValueOutOfRangeError: an empty prompt or a negative temperature.
        """
        if not prompt or temperature < 0:
            raise ValueOutOfRangeError(
                f"a prompt of {len(prompt)} tokens at temperature {temperature}: give at least one, and 0 or more"
            )
        with no_grad():
            caches = self.new_caches(1, len(prompt) + max_tokens)
            logits = self(mt.tensor([list(prompt)]), caches, last_only=True)
        for i in range(max_tokens):
            with no_grad():
                token = sample(logits[0, 0], temperature, generator)
            if token in self.config.eos_token_ids:
                return
            yield token
            if i + 1 < max_tokens:
                with no_grad():
                    logits = self(mt.tensor([[token]]), caches, last_only=True)


def sample(logits: Tensor, temperature: float, generator: Generator | None = None) -> int:
    """One class of logits [C]: the likeliest at temperature 0, else drawn by adding Gumbel noise."""
    logits = logits.float()
    if temperature == 0:
        return int(mt.argmax(logits).item())
    uniform = mt.rand(*logits.shape, dtype=mt.float64, generator=generator)
    noise = -mt.log(-mt.log(uniform + 1e-300))
    return int(mt.argmax(logits.double() / temperature + noise).item())


def _names(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Every tensor of ours with those of the checkpoint that it holds, one below the other."""
    yield "embedding.weight", ["model.embed_tokens.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield f"{ours}.input_norm.weight", [f"{theirs}.input_layernorm.weight"]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            yield f"{ours}.attention.qkv.{kind}", [f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        for kind in ("weight", "bias") if config.output_bias else ("weight",):
            yield f"{ours}.attention.output.{kind}", [f"{theirs}.self_attn.o_proj.{kind}"]
        yield f"{ours}.post_attention_norm.weight", [f"{theirs}.post_attention_layernorm.weight"]
        for part in ("gate", "up", "down"):
            yield f"{ours}.mlp.{part}.weight", [f"{theirs}.mlp.{part}_proj.weight"]
    yield "norm.weight", ["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output_embedding", ["lm_head.weight"]


def _check(config: ModelConfig) -> None:
    kind = config.rope_scaling.kind if config.rope_scaling else None
    problems = (
        (any(config.moe_layers), "a mixture of experts"),
        (any(window is not None for window in config.sliding_windows), "a sliding window"),
        (config.qk_norm, "norms of queries and keys"),
        (config.mlp_bias, "biases in the MLP"),
        (kind not in (None, "linear", "llama3"), f"RoPE scaling {kind!r}"),
    )
    for present, what in problems:
        if present:
            raise UnsupportedModelError(
                f"{config.architecture} with {what} does not run in mainspring.tensor; use mainspring generate"
            )


def _frequencies(theta: float, dim: int, scaling: RopeScaling | None) -> list[float]:
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain]
    low, high, trained = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    assert low is not None and high is not None and trained is not None  # RopeScaling checks it

    def stretched(
        f: float,
    ) -> float:  # the Llama 3.1 release: long waves by the whole factor, short ones not at all
        turns = trained * f / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        return (1 - share) * f / scaling.factor + share * f

    return [stretched(f) for f in plain]
