"""Decoders with fresh random weights."""

from __future__ import annotations

import torch

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.ops import Numerics, Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INITIALIZER_RANGE = 0.02  # Hugging Face's default for every family here


def create_model(
    config: ModelConfig,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    numerics: Numerics = "lockstep",
    backend: str | None = None,
    seed: int = 0,
) -> Decoder:
    """A decoder with fresh weights: matrices normal(0, initializer_range), norms one, biases zero.

    The same seed gives the same weights on every device (they are drawn on the CPU in fp32).
    """
    model = Decoder(
        config, policy=Policy(numerics, backend), device=torch_device(device), dtype=torch_dtype(dtype)
    )
    deviation = float(config.extra.get("initializer_range", _INITIALIZER_RANGE))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, deviation, generator=generator))
    return model


def torch_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it. Raises ConfigError."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} is not one that PyTorch knows; name cpu, cuda or cuda:N"
        ) from error
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise ConfigError(f"device {str(device)!r} is not there: this machine has {count} CUDA devices")
    return found


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of that name. Raises ConfigError for one that parameters are not kept in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
