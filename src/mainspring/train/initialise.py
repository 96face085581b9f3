"""Random weights for a new model."""

from __future__ import annotations

import torch

from mainspring.model.decoder import Decoder
from mainspring.train.recipe import ModelSection

_RESIDUAL_WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def initialise(model: Decoder, settings: ModelSection, seed: int) -> None:
    """Overwrites every weight; equal seeds give equal weights on every device.

    Norm scales are 1, biases 0, embeddings normal with `init_std`, linear weights normal with standard
    deviation init_scale / sqrt(inputs). What writes into the residual stream starts at 0 (each layer is
    then the identity; Zhang et al., arXiv 1901.09321, section 3) or, without `zero_init_residual`, is
    smaller by sqrt(2 · layers) as in GPT-2.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.hf_tensors().items():
        if tensor.ndim == 1:
            tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            std = settings.init_std
        else:
            std = settings.init_scale / tensor.shape[-1] ** 0.5
        if name.endswith(_RESIDUAL_WRITERS):
            std = 0.0 if settings.zero_init_residual else std / (2 * model.config.num_layers) ** 0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
