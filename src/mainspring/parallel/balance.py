"""What the experts of a whole model were given, and the bias that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.experts import ParallelExperts


@dataclass(frozen=True)
class Load:
    """What one layer's experts were asked for."""

    slots: Tensor
    """[E] float64: of each expert, whether it took them or not."""
    dropped: float
    """Of them, those that were beyond an expert's capacity."""


@dataclass(frozen=True)
class ExpertStatistics:
    """The loads of a step in three numbers."""

    imbalance: float
    """The busiest expert's load over the mean, of the worst layer: 1 where all are equal."""
    idle: float
    """Experts that were given nothing, over all, of the worst layer."""
    dropped: float
    """Slots that were dropped, over all, of all layers."""


@torch.no_grad()
def take_loads(model: ParallelDecoder) -> dict[int, Load]:
    """By layer, what its experts were asked for since the last call, over all ranks; clears it."""
    layers = [number for number, moe in enumerate(model.config.moe_layers) if moe]
    if not layers:
        return {}
    experts = model.config.num_experts
    table = torch.zeros(len(layers), experts + 1, dtype=torch.float64, device=model.device)
    for number, block in blocks_by_layer(model).items():
        if model.mesh.index["tp"] == 0:  # the ranks of a tensor-parallel group route the same tokens
            table[layers.index(number), :experts] += block.load
            table[layers.index(number), experts] += block.dropped
        block.load.zero_()
        block.dropped.zero_()
    rows = all_reduce(table, model.mesh.group("world"))
    dropped = rows[:, experts].tolist()
    return {number: Load(rows[i, :experts], dropped[i]) for i, number in enumerate(layers)}


@torch.no_grad()
def move_biases(model: ParallelDecoder, loads: dict[int, Load]) -> None:
    """After a step: the choice of overloaded experts becomes less likely, that of idle ones more."""
    rate = model.balance.bias_rate
    for number, block in blocks_by_layer(model).items() if rate else ():
        load = loads[number].slots
        block.choice_bias += rate * torch.sign(load.mean() - load).to(block.choice_bias.dtype)


def statistics(loads: dict[int, Load]) -> ExpertStatistics | None:
    """None without experts."""
    if not loads:
        return None
    slots = torch.stack([load.slots for load in loads.values()]).cpu()  # [layers, E]
    return ExpertStatistics(
        imbalance=float((slots.amax(1) / slots.mean(1)).max()),
        idle=float((slots == 0).double().mean(1).max()),
        dropped=sum(load.dropped for load in loads.values()) / float(slots.sum()),
    )


def blocks_by_layer(model: ParallelDecoder) -> dict[int, ParallelExperts]:
    """The rank's mixture-of-experts blocks."""
    mlps = {int(number): layer.mlp for number, layer in model.layers.items()}
    return {number: mlp for number, mlp in mlps.items() if isinstance(mlp, ParallelExperts)}
