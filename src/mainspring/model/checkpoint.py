"""Decoders from and to Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mainspring.errors import CheckpointError
from mainspring.formats.files import new_directory, write_json
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.named_models import resolve
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter, TensorEntry, TensorSpec
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import DTYPES, create_model, torch_device, torch_dtype
from mainspring.ops import Numerics, Policy

__all__ = ["create_model", "load_model", "load_weights", "save_model"]

if TYPE_CHECKING:
    from mainspring.formats.tokenizer import Tokenizer

_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED_NAMES = {dtype: name for name, dtype in _STORED_DTYPES.items()}


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype | None = None,
    numerics: Numerics = "lockstep",
    backend: str | None = None,
    quantized: bool = False,
) -> Decoder:
    """The decoder of a Hugging Face directory, of a GGUF file (dequantised), or of a known name ("smollm2").

    dtype: "float32", "bfloat16", "float16" or a torch dtype; None takes the checkpoint's own (of a GGUF file
    bfloat16; ask for float32 to compute with exactly its values). Weights are copied once, from the mapped
    file into the fused parameters.
    quantized: keep the weights of a GGUF file as its blocks (on the CPU; see `load_quantised`). The numbers are then
    the quantised model's own: each row's bits still do not depend on the batch, but there is nothing to train or save.
    Raises ModelNotFoundError, CheckpointError, UnsupportedModelError, ConfigError.
    """
    wanted = torch_dtype(dtype) if dtype is not None else None
    if quantized:
        from mainspring.model.quantised import load_quantised

        return load_quantised(
            path, device=torch_device(device), dtype=wanted, policy=Policy(numerics, backend)
        )
    directory = resolve(path, _converted_dtype(wanted)).path
    config = ModelConfig.from_file(directory / "config.json")
    model = Decoder(
        config,
        policy=Policy(numerics, backend),
        device=torch_device(device),
        dtype=wanted if wanted is not None else torch_dtype(config.dtype),
    )
    load_weights(model, directory)
    return model.eval()


def load_weights(model: Decoder, directory: str | Path) -> None:
    """Fills the model from the directory's safetensors files. Raises CheckpointError on any tensor amiss."""
    reader = CheckpointReader(directory)
    views = model.hf_tensors()
    missing = sorted(set(views) - set(reader.names()))
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the model's {len(views)} tensors; the first is {missing[0]!r}"
        )
    # Old checkpoints also store RoPE's frequencies, and tied models the output embedding a second time.
    unknown = [name for name in reader.names() if name not in views and not name.endswith(".inv_freq")]
    if model.config.tie_word_embeddings:
        unknown = [name for name in unknown if name != "lm_head.weight"]
    if unknown:
        raise CheckpointError(
            f"{directory} has {len(unknown)} tensors that its config.json does not account for; "
            f"the first is {unknown[0]!r}"
        )
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(stored_tensor(reader.entry(name), tuple(view.shape)))


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """A directory's tensors by their Hugging Face names, as views of the mapped files. Raises CheckpointError."""
    reader = CheckpointReader(directory)
    names = [name for name in reader.names() if not name.endswith(".inv_freq")]
    return {name: stored_tensor(reader.entry(name), reader.entry(name).shape) for name in names}


def save_model(
    model: Decoder,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face directory: config.json, safetensors (sharded above max_shard_bytes), tokenizer files.

    A new directory appears whole or not at all; in an existing one the weights are written beside and
    renamed last. Each tensor goes straight from its parameter to the file.
    """
    config = saved_config(model.config, model.dtype)
    write_checkpoint(path, model.hf_tensors(), config, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As `save_model`, of tensors by their Hugging Face names and of a config.json. Raises CheckpointError."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a directory for the checkpoint")
    fresh = not target.exists() or not any(target.iterdir())
    with new_directory(target) if fresh else nullcontext(target) as directory:
        specs = {name: TensorSpec(_STORED_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        with SafetensorsWriter(directory, specs, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in tensors.items():
                flat = tensor.detach().cpu().contiguous().flatten()
                writer.write(name, flat.view(torch.uint8).numpy())
            write_json(directory / "config.json", config)
            if tokenizer is not None:
                tokenizer.save(directory)
            writer.finish()


def _converted_dtype(wanted: torch.dtype | None) -> str:
    """The dtype that a quantised file is dequantised to: wide enough to lose nothing that was asked for."""
    if wanted is None:
        return "bfloat16"
    return next((name for name, dtype in DTYPES.items() if dtype == wanted), "float32")


def saved_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """The config.json of a model whose weights are stored in `dtype`."""
    stored = {torch_type: name for name, torch_type in DTYPES.items()}
    table = config.to_dict()
    table["dtype"] = stored.get(dtype, config.dtype)
    return table


def stored_tensor(entry: TensorEntry, shape: tuple[int, ...]) -> Tensor:
    """The stored tensor as a view of the mapped file. Raises CheckpointError for another shape, or no float dtype."""
    if entry.shape != shape:
        raise CheckpointError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}, its config.json needs {list(shape)}"
        )
    if entry.dtype not in _STORED_DTYPES:
        raise CheckpointError(
            f"tensor {entry.name!r} is stored as {entry.dtype}; weights are read as {', '.join(_STORED_DTYPES)}"
        )
    return torch.frombuffer(entry.data, dtype=_STORED_DTYPES[entry.dtype]).view(shape)
