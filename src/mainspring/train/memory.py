"""What a rank of a layout holds, by formula: parameters, gradients, optimizer state (ZeRO) and activations (Megatron).

Sources: Rajbhandari et al., arXiv 1910.02054, section 3 (states); Korthikanti et al., arXiv 2205.05198, section 4
(activations), with the tensors that this model keeps in place of theirs. `tests/parallel/test_plan.py` holds the
formulas against what a rank really keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from mainspring.formats.model_config import ModelConfig
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Group, Mesh
from mainspring.parallel.monitor import Monitor
from mainspring.parallel.placement import place, rule_of
from mainspring.parallel.schedule import make_schedule

WORKSPACE = 1 << 28
"""Bytes for libraries' workspaces and the allocator's gaps (measured: about 0.25 GiB on an H100)."""
LOGITS = 1 << 24
"""Elements of logits held at once on the CPU; a GPU takes a 32nd of its memory (`ops.log_probs.rows_per_chunk`)."""


@dataclass(frozen=True)
class Batch:
    """A step: `micro_batches` over all replicas of `tokens` tokens each; `itemsize` bytes of the model's dtype."""

    micro_batches: int
    tokens: int
    itemsize: int = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank. gradients and activations: each at its most, which is not at the same time."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    """Logits of a chunk and their gradient, hidden states and their gradient."""
    carried: float = 0.0
    """Gradients of earlier micro-batches, beside the activations' most."""
    workspace: float = float(WORKSPACE)

    @property
    def total(self) -> float:
        backward = max(self.gradients, self.carried + self.activations + self.head)
        return self.parameters + self.optimizer + backward + self.workspace


def estimate(config: ModelConfig, layout: Layout, batch: Batch, device_bytes: int = 0) -> Memory:
    """Of the rank that holds most. device_bytes: the GPU's memory, which sets the size of a chunk of logits."""
    candidates = [_of_stage(config, layout, batch, rank, device_bytes) for rank in range(layout.pp)]
    return max(candidates, key=lambda memory: memory.total)


def rank_shapes(config: ModelConfig, layout: Layout, pipeline_rank: int) -> Mapping[str, tuple[int, ...]]:
    """Local shapes of a pipeline rank's parameters (before ZeRO), of its first tensor-parallel rank."""
    # A plan asks for hundreds of layouts that differ in what changes no shape.
    shaping = replace(layout, dp=layout.ep, cp=1, replicate=1, zero=0, recompute="none")
    return _rank_shapes(config, shaping, pipeline_rank)


@lru_cache(maxsize=4096)
def _rank_shapes(config: ModelConfig, layout: Layout, pipeline_rank: int) -> Mapping[str, tuple[int, ...]]:
    axes = layout.axes
    rank = axes.rank(pp=pipeline_rank)
    groups = {}
    for name, partition in (
        ("ep", axes.expert_groups()),
        ("tp", axes.along("tp")),
        ("keys", axes.key_groups(1)),
    ):
        ranks = next(ranks for ranks in partition if rank in ranks)
        groups[name] = Group(name, ranks, ranks.index(rank))
    return place(config, layout, Mesh(axes, rank, groups, Monitor(rank))).shapes


def _of_stage(config: ModelConfig, layout: Layout, batch: Batch, rank: int, device_bytes: int) -> Memory:
    shards = layout.axes.dp_shard * layout.cp if layout.zero else 1
    expert_shards = max(1, shards // layout.ep)
    whole = shard = 0.0
    units: dict[str, float] = {}
    for name, shape in rank_shapes(config, layout, rank).items():
        count = math.prod(shape)
        experts = rule_of(name).experts
        whole += count
        shard += count / (expert_shards if experts else shards)
        unit = (
            ".".join(name.split(".")[:2]) + (".experts" if experts else "")
            if name.startswith("layers.")
            else name
        )
        units[unit] = units.get(unit, 0.0) + count
    roots = sum(count for unit, count in units.items() if not unit.startswith("layers."))
    layers = [count for unit, count in units.items() if unit.startswith("layers.")]
    largest = max(layers, default=0.0)
    size = batch.itemsize
    # Shards, and what is whole for a while: the roots, the layer that computes and the one before or after it.
    passing = shard + roots + min(2, len(layers)) * largest
    parameters = size * (passing if layout.zero == 3 else whole)
    several = batch.micro_batches // layout.dp > 1
    wide = size if layout.gradient_sums == "narrow" and not several else 4
    if layout.world == 1:  # those of a single micro-batch go to the optimizer as they are
        gradients = (4 + size if several and size != 4 else size) * whole
    else:  # with ZeRO each layer's are scattered behind it: with stage 1 in the last backward pass alone
        scattered = layout.zero >= 2 or (layout.zero == 1 and not several)
        gradients = wide * (passing if scattered else whole + 2 * largest * (layout.zero == 1))
        gradients += size * largest  # autograd's own of a layer before they are collected
    carried = 4 * (shard if layout.zero >= 2 else whole) if several else 0.0
    masters = 4 if size != 4 else 0
    own = [layout.stage_layers(config.num_layers)[stage] for stage in layout.stages_of(rank)]
    everything = replace(layout, recompute="none")
    whole_layers, kept_layers = (
        [[activation_bytes(config, which, layer, size) for layer in layers] for layers in own]
        for which in (everything, layout)
    )
    tokens = batch.tokens / layout.cp
    held = _peak_activations(layout, batch, rank, [sum(layers) for layers in kept_layers])
    # What is not kept of a layer is there again while that layer's backward pass runs.
    again = max(
        whole - kept
        for stage, kept_stage in zip(whole_layers, kept_layers, strict=True)
        for whole, kept in zip(stage, kept_stage, strict=True)
    )
    activations = tokens * (held + again)
    return Memory(
        parameters, gradients, (masters + 8) * shard, activations,
        head_bytes(config, layout, tokens, size, device_bytes) if layout.stages - 1 in layout.stages_of(rank) else 0.0,
        carried,
    )  # fmt: skip


def activation_bytes(config: ModelConfig, layout: Layout, layer: int, itemsize: int) -> float:
    """Kept for the backward pass of one layer, by token of the stream, as the layout's `recompute` has it."""
    tp = layout.tp
    selective = layout.recompute == "selective"
    hidden, query = config.hidden_size, config.num_heads * config.head_dim / tp
    keys = max(config.num_kv_heads / tp, 1.0 if tp > config.num_kv_heads else 0.0) * config.head_dim
    slices = tp if layout.sequence_sliced else 1
    if layout.recompute == "full":
        return itemsize * 2 * hidden / slices  # its two inputs
    stream = (2 if selective else 4) * hidden / slices  # two sums, two normed inputs
    attention = query + 2 * keys  # as projected
    if not selective:
        attention += query + keys + query  # normed and rotated, and the output
    products = 2 if selective else 3  # gate and up, their product
    if not config.moe_layers[layer]:
        return itemsize * (stream + attention + products * config.intermediate_size / tp)
    k, inner = config.num_experts_per_token, config.moe_intermediate_size / tp
    whole = hidden if layout.sequence_sliced else 0  # gathered tokens: the router's input
    # Rows at the experts (one device's plain decoder gathers them as it goes), gate and up, their product, outputs.
    gathers = layout.world == 1 and not selective
    rows = k * ((0 if gathers else hidden) + products * inner + hidden)
    return itemsize * (stream + attention + whole + rows) + 4 * config.num_experts


def head_bytes(config: ModelConfig, layout: Layout, tokens: float, itemsize: int, device_bytes: int) -> float:
    """While the loss is computed."""
    vocabulary = math.ceil(config.vocab_size / layout.tp)
    elements = max(LOGITS, device_bytes // (32 * 4)) if device_bytes else LOGITS
    rows = min(max(16, elements // vocabulary), math.ceil(tokens))
    in_place = device_bytes and layout.tp == 1  # on a GPU the gradient takes the logits' place
    logits = rows * vocabulary * (4 if in_place else 4 + itemsize)
    weight_gradient = (itemsize if rows >= tokens else 4) * vocabulary * config.hidden_size
    return logits + weight_gradient + 2 * itemsize * tokens * config.hidden_size


def _peak_activations(layout: Layout, batch: Batch, rank: int, per_token: list[float]) -> float:
    """The most that the schedule holds at once, by token of a micro-batch."""
    count = max(1, batch.micro_batches // layout.dp)
    stages = layout.stages_of(rank)
    now = most = 0.0
    for action in make_schedule(layout.schedule, layout.pp, layout.virtual, count)[rank]:
        held = per_token[stages.index(action.stage)]
        now += {"F": held, "B": -held, "I": 0.0, "W": -held}[action.kind]
        most = max(most, now)
    return most
