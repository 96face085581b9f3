"""Decoders whose weights stay as a GGUF file quantises them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mainspring.errors import ConfigError, UnsupportedModelError
from mainspring.formats.gguf_file import GGUFFile
from mainspring.formats.named_models import gguf_source
from mainspring.model.decoder import Decoder
from mainspring.model.layers import Linear
from mainspring.model.naming import Part
from mainspring.ops import Policy
from mainspring.ops.quantised_linear import QUANTISED_TYPES, BlockRows, QuantisedWeight


def load_quantised(
    path: str | Path, *, device: torch.device, dtype: torch.dtype | None = None, policy: Policy
) -> Decoder:
    """The decoder of a GGUF file (or of a known name) with its matrices as blocks of codes, on the CPU.

    A matrix of another type than `QUANTISED_TYPES`, and what is no matrix, is expanded to `dtype` (bfloat16 by
    default). Raises UnsupportedModelError for a mixture of experts and for a file without a matrix of these types,
    ConfigError for another device or dtype, and what `GGUFFile` raises.
    """
    dtype = torch.bfloat16 if dtype is None else dtype
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"quantised weights are computed with on the CPU, in bfloat16 or float32, not in {dtype} on {device}; "
            "leave quantized=True out to expand them"
        )
    file = GGUFFile(gguf_source(path))
    if any(file.config.moe_layers):
        raise UnsupportedModelError(
            f"{file.path} is a mixture of experts, whose weights are not kept quantised; leave quantized=True out"
        )
    model = Decoder(file.config, policy=policy, device="meta", dtype=dtype)
    by_parameter: dict[str, list[Part]] = {}
    for part in model.parts():
        by_parameter.setdefault(part.parameter, []).append(part)
    for name, parts in by_parameter.items():
        weight = _blocks(file, parts, dtype) if _is_matrix(model, name) else None
        if weight is None:
            _set_parameter(model, name, torch.cat([_expanded(file, part, dtype) for part in parts]))
        else:
            _set_quantised(model, name, weight)
    if not model.is_quantised:
        stored = sorted({file.stored_type(name) for name in file.tensor_names()})
        raise UnsupportedModelError(
            f"{file.path} stores {', '.join(stored)}; kept quantised are {', '.join(QUANTISED_TYPES)}. Leave "
            "quantized=True out to expand them"
        )
    return model.eval()


def _is_matrix(model: Decoder, name: str) -> bool:
    if name in ("embedding", "output_embedding"):
        return True
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), Linear)


def _blocks(file: GGUFFile, parts: list[Part], dtype: torch.dtype) -> QuantisedWeight | None:
    """The parts below each other; None where one of them has no type of ours."""
    rows = []
    for part in parts:
        kind = file.stored_type(part.name)
        if kind not in QUANTISED_TYPES:
            return None
        with warnings.catch_warnings():  # the mapping is read-only, and nobody writes to blocks
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            rows.append(BlockRows(kind, torch.from_numpy(file.blocks(part.name))))
    weight = QuantisedWeight(rows, dtype)
    weight.prepare()
    return weight


def _expanded(file: GGUFFile, part: Part, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(file.dequantise(part.name)).to(dtype)


def _set_parameter(model: Decoder, name: str, values: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))


def _set_quantised(model: Decoder, name: str, weight: QuantisedWeight) -> None:
    model.is_quantised = True
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    delattr(module, leaf)
    if isinstance(module, Linear):
        module.quantised = weight
    elif name == "embedding":
        model.quantised_embedding = weight
    else:
        model.quantised_output_embedding = weight
