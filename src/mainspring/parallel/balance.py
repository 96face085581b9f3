"""What the experts of a whole model were given, and the bias that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.experts import ParallelExperts


@torch.no_grad()
def take_loads(model: ParallelDecoder) -> dict[int, Tensor]:
    """By layer, the slots that each expert was given since the last call, [E] float64, over all ranks; clears them."""
    layers = [number for number, moe in enumerate(model.config.moe_layers) if moe]
    if not layers:
        return {}
    table = torch.zeros(len(layers), model.config.num_experts, dtype=torch.float64, device=model.device)
    for number, block in blocks_by_layer(model).items():
        if model.mesh.index["tp"] == 0:  # the ranks of a tensor-parallel group route the same tokens
            table[layers.index(number)] += block.load
        block.load.zero_()
    return dict(zip(layers, all_reduce(table, model.mesh.group("world")), strict=True))


@torch.no_grad()
def move_biases(model: ParallelDecoder, loads: dict[int, Tensor]) -> None:
    """After a step: the choice of overloaded experts becomes less likely, that of idle ones more."""
    rate = model.balance.bias_rate
    for number, block in blocks_by_layer(model).items() if rate else ():
        load = loads[number]
        block.choice_bias += rate * torch.sign(load.mean() - load).to(block.choice_bias.dtype)


def imbalance(loads: dict[int, Tensor]) -> float | None:
    """The busiest expert's load over the mean, of the worst layer; None without experts."""
    return max((float(load.max() / load.mean()) for load in loads.values()), default=None)


def blocks_by_layer(model: ParallelDecoder) -> dict[int, ParallelExperts]:
    """The rank's mixture-of-experts blocks."""
    mlps = {int(number): layer.mlp for number, layer in model.layers.items()}
    return {number: mlp for number, mlp in mlps.items() if isinstance(mlp, ParallelExperts)}
