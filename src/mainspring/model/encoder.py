"""The BERT-family encoder (arXiv 1810.04805) over the packed token stream: texts in, hidden states out, no padding.

Sentence embeddings run on it. Attention sees whole sequences in both directions; the norms stand after the residual
additions, as BERT has them. Weights come from a Hugging Face directory with safetensors.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainspring.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from mainspring.formats.safetensors_file import CheckpointReader, TensorEntry
from mainspring.model.layers import Linear
from mainspring.ops import FAST, Policy, TokenBatch
from mainspring.ops.flash_attention import flash_attention

_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of a BERT model, named as in its `config.json`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    num_token_types: int
    layer_norm_eps: float

    @staticmethod
    def from_file(path: str | Path) -> EncoderConfig:
        """Reads a `config.json`. Raises CheckpointError if it is damaged, UnsupportedModelError if no plain BERT."""
        try:
            fields = json.loads(Path(path).read_bytes())
            kind = fields.get("model_type")
            if kind != "bert":
                raise UnsupportedModelError(
                    f"{path} describes a model of type {kind!r}; the encoder runs 'bert'"
                )
            _refuse_variants(path, fields)
            return EncoderConfig(
                vocab_size=int(fields["vocab_size"]),
                hidden_size=int(fields["hidden_size"]),
                num_layers=int(fields["num_hidden_layers"]),
                num_heads=int(fields["num_attention_heads"]),
                intermediate_size=int(fields["intermediate_size"]),
                max_positions=int(fields["max_position_embeddings"]),
                num_token_types=int(fields["type_vocab_size"]),
                layer_norm_eps=float(fields["layer_norm_eps"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not the configuration of a BERT model: {error!r}") from error


def _refuse_variants(path: str | Path, fields: dict[str, Any]) -> None:
    for key, supported in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        value = fields.get(key, supported)
        if value != supported:
            raise UnsupportedModelError(f"{path} has {key} {value!r}; the encoder knows {supported!r}")


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last axis (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, size] -> [T, size]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class EncoderLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); query, key and value are fused in one matrix."""

    def __init__(
        self, config: EncoderConfig, policy: Policy, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_heads
        self.qkv = Linear(hidden, 3 * hidden, True, policy, device, dtype)
        self.output = Linear(hidden, hidden, True, policy, device, dtype)
        self.attention_norm = LayerNorm(hidden, config.layer_norm_eps, device, dtype)
        self.up = Linear(hidden, inner, True, policy, device, dtype)
        self.down = Linear(inner, hidden, True, policy, device, dtype)
        self.norm = LayerNorm(hidden, config.layer_norm_eps, device, dtype)

    def forward(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [T, H, D] each
        attended = bidirectional_attention(q, k, v, batch).flatten(1)
        x = self.attention_norm(x + self.output(attended))
        normed: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return normed


class Encoder(nn.Module):
    """BERT without its heads. Parameters are uninitialised: see `load_encoder`."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        policy: Policy = FAST,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise UnsupportedModelError(
                f"{config.num_heads} heads do not divide the width {config.hidden_size}"
            )
        self.config = config

        def table(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, config.hidden_size, device=device, dtype=dtype))

        self.words = table(config.vocab_size)
        self.positions = table(config.max_positions)
        self.token_types = table(config.num_token_types)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, device, dtype)
        self.layers = nn.ModuleList(
            EncoderLayer(config, policy, device, dtype) for _ in range(config.num_layers)
        )

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def dtype(self) -> torch.dtype:
        return self.words.dtype

    def forward(self, tokens: Tensor, batch: TokenBatch, token_types: Tensor | None = None) -> Tensor:
        """tokens, token_types: [T] int64 (types are all 0 by default) -> hidden states [T, hidden].

        Raises InvalidRequestError if a sequence is longer than the table of positions: nothing is cut.
        """
        longest = max(batch.lengths)
        if longest > self.config.max_positions:
            raise InvalidRequestError(
                f"a sequence has {longest} tokens; the encoder knows {self.config.max_positions} positions: split it"
            )
        types = self.token_types[0] if token_types is None else F.embedding(token_types, self.token_types)
        x: Tensor = self.norm(
            F.embedding(tokens, self.words) + F.embedding(batch.positions, self.positions) + types
        )
        for layer in self.layers:
            x = layer(x, batch)
        return x

    def mean_embeddings(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The mean of each sequence's hidden states, scaled to length 1: [S, hidden] float32.

        Every token counts, [CLS] and [SEP] included (Sentence-BERT, arXiv 1908.10084).
        """
        hidden = self.hidden_states(sequences).float()
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        return F.normalize(torch.segment_reduce(hidden, "mean", lengths=lengths), dim=-1)

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The last layer's state of each token, the sequences end to end: [T, hidden]."""
        batch = TokenBatch.packed([len(sequence) for sequence in sequences], self.device)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=self.device)
        hidden: Tensor = self(tokens, batch)
        return hidden


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v within each sequence of the batch; q, k, v: [T, H, D] -> [T, H, D].

    On a GPU by the flash kernels. On a CPU, sequences of equal length share their matrix products, so that a batch
    sorted by length makes few, and no padding is computed.
    """
    scale = float(q.shape[-1] ** -0.5)
    if q.device.type != "cpu":
        longest = max(batch.lengths)
        cu = batch.cu_seqlens
        return flash_attention(q, k, v, cu, cu, max_q=longest, max_k=longest, scale=scale, causal=False)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, count, length in _equal_lengths(batch.lengths):
        queries, keys, values = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale)  # [count, H, length, D]
        out[rows] = attended.transpose(1, 2).flatten(0, 1)
    return out


def _equal_lengths(lengths: Sequence[int]) -> Iterator[tuple[slice | Tensor, int, int]]:
    """(rows of the stream, how many sequences, their length): neighbours of equal length as one slice."""
    if list(lengths) in (sorted(lengths), sorted(lengths, reverse=True)):
        start = 0
        counts: dict[int, int] = {}
        for length in lengths:
            counts[length] = counts.get(length, 0) + 1
        for length, count in counts.items():
            yield slice(start, start + count * length), count, length
            start += count * length
        return
    groups: dict[int, list[int]] = defaultdict(list)
    start = 0
    for length in lengths:
        groups[length].append(start)
        start += length
    for length, starts in groups.items():
        rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
        yield rows, len(starts), length


def load_encoder(
    directory: str | Path,
    *,
    policy: Policy = FAST,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The encoder of a Hugging Face directory (`config.json`, `model.safetensors`), ready for inference.

    A pooler's or a head's tensors are left out. Raises CheckpointError and UnsupportedModelError.
    """
    path = Path(directory)
    config = EncoderConfig.from_file(path / "config.json")
    reader = CheckpointReader(path)
    encoder = Encoder(config, policy=policy, device=device, dtype=dtype)
    prefix = "" if "embeddings.word_embeddings.weight" in reader else "bert."
    with torch.no_grad():
        for name, view in _hugging_face_names(encoder):
            view.copy_(_stored(reader.entry(prefix + name), view.shape))
    return encoder.eval().requires_grad_(False)


def _hugging_face_names(encoder: Encoder) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, the part of our parameter that it fills)."""
    yield "embeddings.word_embeddings.weight", encoder.words
    yield "embeddings.position_embeddings.weight", encoder.positions
    yield "embeddings.token_type_embeddings.weight", encoder.token_types
    yield from _named("embeddings.LayerNorm", encoder.norm)
    for index, layer in enumerate(encoder.layers):
        assert isinstance(layer, EncoderLayer)
        prefix = f"encoder.layer.{index}"
        assert layer.qkv.bias is not None  # BERT's linear layers all have one
        weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            yield f"{prefix}.attention.self.{part}.weight", weight
            yield f"{prefix}.attention.self.{part}.bias", bias
        yield from _named(f"{prefix}.attention.output.dense", layer.output)
        yield from _named(f"{prefix}.attention.output.LayerNorm", layer.attention_norm)
        yield from _named(f"{prefix}.intermediate.dense", layer.up)
        yield from _named(f"{prefix}.output.dense", layer.down)
        yield from _named(f"{prefix}.output.LayerNorm", layer.norm)


def _named(name: str, module: Linear | LayerNorm) -> Iterator[tuple[str, Tensor]]:
    assert module.bias is not None
    yield f"{name}.weight", module.weight
    yield f"{name}.bias", module.bias


def _stored(entry: TensorEntry, shape: torch.Size) -> Tensor:
    dtype = _STORED_DTYPES.get(entry.dtype)
    if dtype is None or tuple(entry.shape) != tuple(shape):
        raise CheckpointError(
            f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; the encoder needs {list(shape)} in one of "
            f"{', '.join(_STORED_DTYPES)}"
        )
    return torch.frombuffer(entry.data, dtype=dtype).reshape(shape)
