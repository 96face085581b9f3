"""Random weights for a new model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mainspring.model.decoder import Decoder
from mainspring.train.recipe import ModelSection

_RESIDUAL_WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def initialise(model: Decoder, settings: ModelSection, seed: int) -> None:
    """Overwrites every weight with `initial_tensors`."""
    tensors = model.hf_tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, value in initial_tensors(shapes, model.config.num_layers, settings, seed):
        tensors[name].copy_(value)


def initial_tensors(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, settings: ModelSection, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 value) one by one; equal seeds give equal weights on every device and under every layout.

    Norm scales are 1, biases 0, embeddings normal with `init_std`, linear weights normal with standard
    deviation init_scale / sqrt(inputs). What writes into the residual stream starts at 0 (each layer is
    then the identity; Zhang et al., arXiv 1901.09321, section 3) or, without `zero_init_residual`, is
    smaller by sqrt(2 · layers) as in GPT-2.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0)
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            std = settings.init_std
        else:
            std = settings.init_scale / shape[-1] ** 0.5
        if name.endswith(_RESIDUAL_WRITERS):
            std = 0.0 if settings.zero_init_residual else std / (2 * num_layers) ** 0.5
        yield name, torch.randn(shape, generator=generator) * std
