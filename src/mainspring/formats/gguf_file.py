"""Reads models from GGUF files and converts them to Hugging Face directories.

Tensors come out under Hugging Face's names and in its layout: llama.cpp stores the rows of Llama's q and k
projections interleaved for its way of rotating, which is undone here. Quantised blocks are expanded by the `gguf`
package, a few thousand rows at a time, so that a conversion needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from mainspring.errors import CheckpointError, UnsupportedModelError
from mainspring.formats.files import new_directory, write_json
from mainspring.formats.gguf_config import TensorSource, eos_ids, read_config, tensor_sources
from mainspring.formats.gguf_header import GGUFHeader, GGUFTensor
from mainspring.formats.gguf_tokenizer import build_tokenizer
from mainspring.formats.model_config import DTYPES, ModelConfig
from mainspring.formats.safetensors_file import SafetensorsWriter, TensorEntry, TensorSpec
from mainspring.formats.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

_PLAIN_TYPES = ("F32", "F16", "BF16")
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CHUNK_ELEMENTS = 1 << 21  # 8 MiB of float32: stays near the cache, and is plenty to amortise a call


class GGUFFile:
    """One GGUF model, mapped. Raises CheckpointError if the file is corrupt, UnsupportedModelError if unknown."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = GGUFHeader(self.path)
        self.config: ModelConfig = read_config(self.header, "bfloat16")
        if self.config.num_layers > len(self.header.tensors):
            raise CheckpointError(
                f"the GGUF file {self.path} announces {self.config.num_layers} layers but holds only "
                f"{len(self.header.tensors)} tensors; fetch it anew"
            )
        self._sources = tensor_sources(self.header, self.config)
        self._check_shapes()

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, if the file carries one."""
        template = self.header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the file carries; raises TokenizerError if it is of an unknown kind."""
        metadata = self.header.metadata
        return Tokenizer(*build_tokenizer(metadata), eos_ids(metadata))

    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face's names of all tensors."""
        return tuple(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` in Hugging Face's layout."""
        source, tensor = self._find(name)
        return tensor.shape if source.expert is None else tensor.shape[1:]

    def entry(self, name: str) -> TensorEntry:
        """Tensor `name` as stored, if it is F32, F16 or BF16; raises CheckpointError if it is quantised."""
        source, tensor = self._find(name)
        if tensor.type not in _PLAIN_TYPES:
            raise CheckpointError(
                f"tensor {name!r} of {self.path} is quantised as {tensor.type}: use dequantise()"
            )
        width = 4 if tensor.type == "F32" else 2
        rows = _source_rows(source, tensor)
        elements = rows.view(f"<u{width}").reshape(self.shape(name))
        if source.rope_heads:
            elements = elements[_unpermuted_rows(elements.shape[0], source.rope_heads)]
        flat: npt.NDArray[Any] = np.ascontiguousarray(elements).reshape(-1)
        return TensorEntry(name, tensor.type, self.shape(name), flat.view(np.uint8).data)

    def stored_type(self, name: str) -> str:
        """The GGML type of tensor `name`, such as "F32" or "Q4_1"."""
        return self._find(name)[1].type

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """The rows of matrix `name` as they are stored, uint8 [rows, bytes of a row], in Hugging Face's order.

        A view of the mapped file, but for rows that llama.cpp has rearranged.
        """
        source, tensor = self._find(name)
        rows = _source_rows(source, tensor)
        return rows[_unpermuted_rows(len(rows), source.rope_heads)] if source.rope_heads else rows

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """Tensor `name` as float32, whatever its stored type, in Hugging Face's layout."""
        return np.concatenate([chunk for _, chunk in self.chunks(name)]).reshape(self.shape(name))

    def chunks(self, name: str) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yields (offset in elements, flat float32 values) of tensor `name`, in order, in pieces of bounded size."""
        source, tensor = self._find(name)
        kind = GGMLQuantizationType[tensor.type]
        rows = _source_rows(source, tensor)
        if len(tensor.shape) == 1:
            values = dequantize(rows, kind).reshape(-1)
            yield 0, values[_unpermuted_rows(values.size, source.rope_heads)] if source.rope_heads else values
            return
        width = tensor.shape[-1]
        order = _unpermuted_rows(len(rows), source.rope_heads) if source.rope_heads else None
        step = max(1, _CHUNK_ELEMENTS // max(width, 1))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step] if order is None else rows[order[begin : begin + step]]
            yield begin * width, dequantize(part, kind).reshape(-1)

    def _find(self, name: str) -> tuple[TensorSource, GGUFTensor]:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r} among its {len(self._sources)}")
        return source, self.header.tensors[source.gguf_name]

    def _check_shapes(self) -> None:
        expected = _expected_shapes(self.config)
        for name, shape in expected.items():
            if name not in self._sources:
                raise CheckpointError(f"the GGUF file {self.path} lacks the tensor {name!r}")
            source, tensor = self._find(name)
            if source.expert is not None and tensor.shape[0] != self.config.num_experts:
                raise CheckpointError(
                    f"{self.path} has {tensor.shape[0]} experts in {source.gguf_name!r}, not {self.config.num_experts}"
                )
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"{self.path} has {name!r} of shape {self.shape(name)}: expected {shape}"
                )
        surplus = self._sources.keys() - expected.keys()
        if surplus:
            raise UnsupportedModelError(
                f"{self.path} has a tensor {min(surplus)!r}, which {self.config.architecture} does not know"
            )


def convert_to_directory(
    gguf_path: str | Path, directory: str | Path, dtype: str = "bfloat16", progress: Progress | None = None
) -> None:
    """Writes the model of a GGUF file as a Hugging Face directory: weights, configuration and tokenizer.

    `dtype` is that of the weights (`DTYPES`). `progress` is called with (bytes written, bytes in all). The
    directory appears whole at the end; a failure or a crash leaves nothing under its name. Raises CheckpointError
    if it exists and has something in it or cannot be written, and what `GGUFFile` and `Tokenizer` raise.
    """
    target = Path(directory)
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"dtype {dtype!r} is not supported; the known ones are: {', '.join(DTYPES)}"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already: give an empty or a new directory")
    file = GGUFFile(gguf_path)
    tokenizer = file.tokenizer()
    config = read_config(file.header, dtype)
    try:
        with new_directory(target) as partial:
            _write_weights(file, partial, dtype, progress)
            write_json(partial / "config.json", config.to_dict())
            tokenizer.save(partial)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {target}: {error.strerror}") from error


def _write_weights(file: GGUFFile, directory: Path, dtype: str, progress: Progress | None) -> None:
    stored = _SAFETENSORS_DTYPES[dtype]
    specs = {name: TensorSpec(stored, file.shape(name)) for name in file.tensor_names()}
    total = sum(spec.nbytes for spec in specs.values())
    done = 0
    with SafetensorsWriter(directory, specs) as writer:
        for name, spec in specs.items():
            for offset, values in file.chunks(name):
                writer.write(name, to_stored(values, dtype), offset * spec.itemsize)
                done += values.size * spec.itemsize
                if progress is not None:
                    progress(done, total)
        writer.finish()


def to_stored(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 values rounded to nearest even in `dtype`; bfloat16 comes as the uint16 of its bits."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding 0x7FFF, and 1 more if the kept part is odd, carries into it exactly when rounding up is due.
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # a carry could turn a NaN into infinity: keep its sign and make it quiet
        result[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return result


def _source_rows(source: TensorSource, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
    if source.expert is None:
        return tensor.rows
    count = math.prod(tensor.shape[1:-1])
    return tensor.rows[source.expert * count : (source.expert + 1) * count]


def _unpermuted_rows(count: int, heads: int) -> npt.NDArray[np.intp]:
    """For each row in Hugging Face's order (halves of a head apart), where llama.cpp put it (interleaved)."""
    return np.arange(count).reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of `config` has."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config, config.moe_layers[layer]).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _layer_shapes(config: ModelConfig, sparse: bool) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (hidden, q_rows)
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if not sparse:
        return shapes | _mlp_shapes(
            "mlp", ("gate_proj", "up_proj", "down_proj"), config, config.intermediate_size
        )
    block, names = ("block_sparse_moe", ("w1", "w3", "w2"))
    if config.model_type != "mixtral":
        block, names = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    shapes[f"{block}.gate.weight"] = (config.num_experts, hidden)
    for expert in range(config.num_experts):
        shapes |= _mlp_shapes(f"{block}.experts.{expert}", names, config, config.moe_intermediate_size)
    return shapes


def _mlp_shapes(
    prefix: str, names: tuple[str, str, str], config: ModelConfig, width: int
) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.{gate}.weight": (width, hidden),
        f"{prefix}.{up}.weight": (width, hidden),
    }
    shapes[f"{prefix}.{down}.weight"] = (hidden, width)
    if config.mlp_bias:
        shapes |= {
            f"{prefix}.{gate}.bias": (width,),
            f"{prefix}.{up}.bias": (width,),
            f"{prefix}.{down}.bias": (hidden,),
        }
    return shapes
