"""`parallelize(model, layout, mesh)`: the model's modules replaced by sharded twins on plain local tensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.model.layers import Attention, DecoderLayer, Linear, MixtureOfExperts
from mainspring.model.naming import parts
from mainspring.parallel.attention import ContextAttention
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.experts import Balance, ParallelExperts
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.placement import Block, Placement, place
from mainspring.parallel.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel


def parallelize(
    model: Decoder,
    layout: Layout,
    mesh: Mesh,
    *,
    balance: Balance | None = None,
    device: torch.device | str | None = None,
) -> ParallelDecoder:
    """The rank's share of the model, which is used up: its modules become those of the result.

    A model with weights gives each rank a copy of its blocks. One on the meta device gives local parameters there
    too, or uninitialised on `device`; `parallel.checkpoint` fills them, so that no rank ever holds the whole.
    Raises ConfigError where the layout does not fit the model or the mesh.
    """
    layout.check(model.config)
    if layout.axes != mesh.axes:
        raise ConfigError(f"layout {layout} needs a mesh of {layout.axes}, this one has {mesh.axes}")
    if layout.key_copies(model.config) != mesh.group("keys").size:
        raise ConfigError(
            f"layout {layout}: {layout.key_copies(model.config)} ranks share a key head, "
            f"the mesh was built for {mesh.group('keys').size}; pass key_copies to Mesh.build"
        )
    if getattr(model, "quantised_embedding", None) is not None:
        raise ConfigError("a quantised model cannot be cut over ranks; load it in bfloat16 or float32")
    if balance is not None and balance.capacity and model.policy.numerics == "lockstep":
        raise ConfigError(
            f"an expert capacity of {balance.capacity} drops tokens by what else is in their batch, so a token's "
            "numbers would depend on it, which lockstep rules out; train with numerics fast, or without a capacity"
        )
    placement = place(model.config, layout, mesh)
    parameters = dict(model.named_parameters())
    local = {
        name: _local_parameter(model, parameters, name, blocks, placement, device)
        for name, blocks in placement.blocks.items()
    }
    tp = TensorParallel(mesh.group("tp"), model.policy, layout.sequence_sliced, layout.tp_invariant)
    balance = balance or Balance()
    stages = layout.stages_of(mesh.index["pp"])
    ranges = layout.stage_layers(model.config.num_layers)
    layers: dict[int, nn.Module] = {}
    for stage in stages:
        for number in ranges[stage]:
            layer = cast(DecoderLayer, model.layers[number])
            _fill(layer, f"layers.{number}.", local)
            layers[number] = _twin_layer(layer, layout, mesh, tp, balance)
    last = layout.stages - 1 in stages
    if last:
        model.norm.weight = local["norm.weight"]
    return ParallelDecoder(
        model.config, model.policy, layout, mesh, placement, tp, balance,
        local.get("embedding"), layers, model.norm if last else None, local.get("output_embedding"),
    ).train(model.training)  # fmt: skip


def _local_parameter(
    model: Decoder,
    parameters: dict[str, nn.Parameter],
    name: str,
    blocks: list[Block],
    placement: Placement,
    device: torch.device | str | None,
) -> nn.Parameter:
    whole = parameters[name]
    where = device if device is not None else whole.device
    local = torch.empty(placement.shapes[name], dtype=whole.dtype, device=where)
    if not whole.is_meta:
        views = {
            part.name: part.view(whole.detach()) for part in parts(model.config) if part.parameter == name
        }
        for block in blocks:
            block.view(local).copy_(_rectangle(views[block.name], block))
    return nn.Parameter(local)


def _rectangle(tensor: Tensor, block: Block) -> Tensor:
    for dim, (start, size) in enumerate(zip(block.start, block.shape, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _fill(module: nn.Module, prefix: str, local: dict[str, nn.Parameter]) -> None:
    for name, _ in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, local[prefix + name])


def _twin_layer(
    layer: DecoderLayer, layout: Layout, mesh: Mesh, tp: TensorParallel, balance: Balance
) -> DecoderLayer:
    attention = layer.attention
    attention.num_heads //= layout.tp
    attention.num_kv_heads = max(1, attention.num_kv_heads // layout.tp)
    attention.qkv = _column(attention.qkv, tp)
    attention.output = _row(attention.output, tp)
    if layout.cp > 1:
        layer.attention = cast(Attention, ContextAttention(attention, mesh.group("cp"), layout.context))
    if isinstance(layer.mlp, MixtureOfExperts):
        layer.mlp = cast(
            MixtureOfExperts,
            ParallelExperts(
                layer.mlp, tp, mesh.group("ep"), mesh.group("cp"), balance,
                recompute=layout.recompute == "selective",
            ),
        )  # fmt: skip
    else:
        layer.mlp.gate_up = _column(layer.mlp.gate_up, tp)
        layer.mlp.down = _row(layer.mlp.down, tp)
    return layer


# A twin stands where a Linear stood: it is called in the same way and has the same parameters.
def _column(linear: Linear, tp: TensorParallel) -> Linear:
    return cast(Linear, ColumnParallelLinear(linear, tp))


def _row(linear: Linear, tp: TensorParallel) -> Linear:
    return cast(Linear, RowParallelLinear(linear, tp))
