"""The models that training is timed on, and their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mainspring.formats.model_config import ModelConfig
from mainspring.train.packing import MicroBatch

SEQUENCE = 2048


@dataclass(frozen=True)
class Case:
    """A model and the sequences of a micro-batch."""

    config: ModelConfig
    sequences: int
    length: int = SEQUENCE

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def micro_batches(self, count: int, seed: int = 0) -> list[MicroBatch]:
        """The same sequences, however many micro-batches they are cut into."""
        random = np.random.default_rng(seed)
        rows = random.integers(0, self.config.vocab_size, (count, self.sequences, self.length + 1))
        lengths = (self.length,) * self.sequences
        return [MicroBatch(r[:, :-1].flatten(), r[:, 1:].flatten(), lengths) for r in rows]


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> ModelConfig:
    return _config(
        "LlamaForCausalLM", "llama", layers, hidden, heads, kv_heads, vocabulary, intermediate_size=inner
    )


def _config(
    architecture: str,
    kind: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **more: Any,
) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "architectures": [architecture], "model_type": kind, "vocab_size": vocabulary, "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 1 << 16, "tie_word_embeddings": False, **more,
        }
    )  # fmt: skip


def _qwen(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head: int, words: int
) -> ModelConfig:
    return _config(
        "Qwen3ForCausalLM", "qwen3", layers, hidden, heads, kv_heads, words, intermediate_size=inner, head_dim=head,
        tie_word_embeddings=True,
    )  # fmt: skip


def _experts(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, words: int) -> ModelConfig:
    """Eight experts, of which two serve a token: the active weights of a dense model of twice the inner width."""
    return _config(
        "MixtralForCausalLM", "mixtral", layers, hidden, heads, kv_heads, words, intermediate_size=inner,
        num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip


CASES = {
    "1.1b": Case(_llama(22, 2048, 5632, 32, 4, 32000), 16),
    "1.1b-16": Case(_llama(22, 2048, 5632, 16, 4, 32000), 16),
    "qwen3-0.6b": Case(_qwen(28, 1024, 3072, 16, 8, 128, 151936), 8),
    "moe": Case(_experts(22, 2048, 2816, 32, 4, 32000), 8),
    "1.1b-8": Case(_llama(22, 2048, 5632, 32, 4, 32000), 8),
    "tiny": Case(_llama(4, 64, 160, 4, 2, 512), 4, 64),
    "tiny-qwen": Case(_qwen(2, 64, 160, 4, 2, 16, 512), 2, 64),
    "tiny-moe": Case(_experts(2, 64, 96, 4, 2, 512), 2, 64),
}
