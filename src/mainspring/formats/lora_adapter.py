"""Reads LoRA adapters as PEFT writes them: a directory with `adapter_config.json` and `adapter_model.safetensors`.

For a linear layer y = W x an adapter holds A [r, in] and B [out, r], and y becomes W x + scale · B A x, where scale is
lora_alpha / r (Hu et al. 2021, "LoRA", section 4.1) or lora_alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA", eq. 2).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainspring.errors import CheckpointError
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.formats.tensor_spec import TensorEntry

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LoraModule:
    """What an adapter adds to one linear layer: scale · B A x. a: [rank, in], b: [out, rank]."""

    rank: int
    scale: float
    a: TensorEntry
    b: TensorEntry


def read_lora_adapter(directory: str | Path) -> dict[str, LoraModule]:
    """The adapter's modules by their names in the base model ("model.layers.0.self_attn.q_proj").

    Raises:
        CheckpointError: a file is missing or corrupt, the tensors contradict the configuration, or the adapter is of a
            kind that is not supported (anything but plain LoRA of linear layers).
    """
    path = Path(directory)
    config = _read_config(path / CONFIG_NAME)
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{path} has no {WEIGHTS_NAME}; save the adapter as safetensors")
    reader = CheckpointReader(weights)
    sides: dict[str, dict[str, TensorEntry]] = {}
    for name in reader.names():
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise CheckpointError(
                f"{weights} holds {name!r}, which is no lora_A or lora_B of a linear layer; only those are supported"
            )
        sides.setdefault(match["module"], {})[match["side"]] = reader.entry(name)
    if not sides:
        raise CheckpointError(f"{weights} holds no tensors")
    return {module: _module(module, pair, config, path) for module, pair in sides.items()}


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the adapter's {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path} describes an adapter of type {kind!r}; only 'LORA' is supported")
    for key, harmless in (
        ("bias", (None, "none")),
        ("use_dora", (None, False)),
        ("fan_in_fan_out", (None, False)),
        ("modules_to_save", (None, [])),
        ("trainable_token_indices", (None, [])),
        ("lora_bias", (None, False)),
    ):
        if config.get(key) not in harmless:
            raise CheckpointError(
                f"{path} has {key} = {config[key]!r}, which is not supported; train without it"
            )
    if not _is_rank(config.get("r")):
        raise CheckpointError(f"{path} has r = {config.get('r')!r}, but must be a whole number of at least 1")
    return config


def _module(
    module: str, pair: Mapping[str, TensorEntry], config: Mapping[str, Any], path: Path
) -> LoraModule:
    if set(pair) != {"A", "B"}:
        raise CheckpointError(f"the adapter {path} has only lora_{next(iter(pair))} of {module!r}")
    a, b = pair["A"], pair["B"]
    rank = _by_pattern(config, "rank_pattern", module, config["r"])
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"the adapter {path} has lora_A {list(a.shape)} and lora_B {list(b.shape)} for {module!r}, but its "
            f"configuration says rank {rank}"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"the adapter {path} has lora_alpha {alpha!r} for {module!r}, which is no number"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(rank, scale, a, b)


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
