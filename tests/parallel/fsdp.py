"""PyTorch's FSDP2 on the plain decoder: the oracle of ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mainspring.model.checkpoint import load_model
from mainspring.ops import IGNORE_INDEX, TokenBatch, cross_entropy
from mainspring.train.verify import VerifySettings, micro_batches


def fsdp2_gradients(directory: str, settings: VerifySettings) -> dict[str, Any]:
    """This rank's rows of the first step's gradients, by Hugging Face's names of whole parameters."""
    model = load_model(directory, dtype="float32", numerics="fast").train()
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = micro_batches(model.config, settings, 0)
    count = sum(int((b.targets != IGNORE_INDEX).sum()) for b in batches)
    for batch in batches[dist.get_rank() :: world]:
        hidden = model(torch.from_numpy(batch.tokens), TokenBatch.packed(batch.lengths))
        model.unshard()
        loss = cross_entropy(
            hidden, model.output_weight, torch.from_numpy(batch.targets), reduction="sum", policy=model.policy
        )
        (loss * world / count).backward()  # FSDP2 takes the mean over the ranks
    named = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output_embedding,
    }
    for i, layer in enumerate(model.layers):
        named[f"model.layers.{i}.self_attn.o_proj.weight"] = layer.attention.output.weight
        named[f"model.layers.{i}.mlp.down_proj.weight"] = layer.mlp.down.weight
        named[f"model.layers.{i}.input_layernorm.weight"] = layer.input_norm.weight
        named[f"model.layers.{i}.self_attn.q_norm.weight"] = layer.attention.q_norm.weight
    return {name: parameter.grad.to_local().numpy().copy() for name, parameter in named.items()}
