"""The table of how parameters are cut over ranks, and every block of a checkpoint that a rank holds.

Parameters are named as in the unsharded decoder, blocks as in the Hugging Face checkpoint, so that any layout reads
and writes any other's checkpoint: a rank's share is a list of `Block`s, rectangles of named tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.naming import Part, parts
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh, even_bounds

Cut = Literal["rows", "columns", "whole"]
Gradient = Literal["own", "partial", "sequence"]


@dataclass(frozen=True)
class Rule:
    """How parameters whose name ends in `suffix` are cut over tp.

    gradient: what a rank's gradient is. "own": that of its block, or the same on every rank. "partial": a term of the
    sum over the ranks, whose tokens or heads differ. "sequence": partial if the sequence is sliced.
    """

    suffix: str
    cut: Cut
    gradient: Gradient = "own"
    experts: bool = False


# The first rule whose suffix fits counts.
TABLE = (
    Rule("output_embedding", "rows"),
    Rule("embedding", "rows"),
    Rule("attention.qkv.weight", "rows"),
    Rule("attention.qkv.bias", "rows"),
    Rule("attention.output.weight", "columns"),
    Rule("attention.output.bias", "whole", "sequence"),
    Rule("q_norm.weight", "whole", "partial"),  # of the rank's own heads
    Rule("k_norm.weight", "whole", "partial"),
    Rule("mlp.gate_up.weight", "rows"),
    Rule("mlp.gate_up.bias", "rows"),
    Rule("mlp.down.weight", "columns"),
    Rule("mlp.down.bias", "whole", "sequence"),
    Rule(
        "mlp.router.weight", "whole", "partial"
    ),  # its tokens' experts give each rank a part of their output
    Rule("mlp.gate_up", "rows", experts=True),
    Rule("mlp.down", "columns", experts=True),
    Rule("norm.weight", "whole", "sequence"),
)


def rule_of(parameter: str) -> Rule:
    """The rule of a parameter of the decoder."""
    return next(rule for rule in TABLE if parameter.endswith(rule.suffix))


@dataclass(frozen=True)
class Block:
    """A rectangle of the checkpoint's tensor `name` that this rank holds.

    It begins at index `start` of the tensor, has `shape`, and lies in rows row : row + shape[0] of the local
    `parameter` (of local expert `expert`, if that is 3-D). `copies` ranks of the mesh's group `holders` hold the same;
    if `is_sum`, their gradients are terms of a sum.
    """

    name: str
    parameter: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    row: int
    expert: int | None = None
    holders: str | None = None
    copies: int = 1
    is_sum: bool = False

    def view(self, local: Tensor) -> Tensor:
        """The block inside the local parameter, contiguous."""
        matrix = local if self.expert is None else local[self.expert]
        return matrix[self.row : self.row + self.shape[0]]

    def offset(self, local_shape: Sequence[int]) -> int:
        """Elements of the local parameter before the block."""
        width = 1 if len(self.shape) == 1 else self.shape[1]
        rows = 0 if self.expert is None else self.expert * local_shape[1]
        return (rows + self.row) * width


@dataclass(frozen=True)
class Placement:
    """A rank's share of a model: its blocks by parameter, and the local parameters' shapes."""

    blocks: dict[str, list[Block]]
    shapes: dict[str, tuple[int, ...]]


def place(config: ModelConfig, layout: Layout, mesh: Mesh) -> Placement:
    """The share of the mesh's rank. Parameters of other stages are left out."""
    held = parameters_of_rank(config, layout, mesh)
    full = full_shapes(config)
    blocks = {
        name: list(_blocks(config, layout, mesh, name, its_parts))
        for name, its_parts in _parts_by_parameter(config).items()
        if name in held
    }
    return Placement(blocks, {name: _local_shape(full[name], b) for name, b in blocks.items()})


def parameters_of_rank(config: ModelConfig, layout: Layout, mesh: Mesh) -> set[str]:
    """Names of the parameters of the rank's pipeline stages."""
    stages = layout.stages_of(mesh.index["pp"])
    ranges = layout.stage_layers(config.num_layers)
    layers = {layer for stage in stages for layer in ranges[stage]}
    first, last = 0 in stages, layout.stages - 1 in stages

    def belongs(name: str) -> bool:
        if name.startswith("layers."):
            return int(name.split(".")[1]) in layers
        if name == "embedding":
            return first or (last and config.tie_word_embeddings)
        return last

    return {name for name in full_shapes(config) if belongs(name)}


@lru_cache(maxsize=16)
def full_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter of the unsharded decoder."""
    model = Decoder(config, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@lru_cache(maxsize=16)
def hf_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, in its order."""
    full = full_shapes(config)
    found: dict[str, tuple[int, ...]] = {}
    for part in parts(config):
        matrix = full[part.parameter][1:] if part.expert is not None else full[part.parameter]
        rows = matrix[0] if part.stop is None else part.stop - part.start
        found[part.name] = (rows, *matrix[1:])
    return found


@lru_cache(maxsize=16)
def _parts_by_parameter(config: ModelConfig) -> Mapping[str, Sequence[Part]]:
    by_parameter: dict[str, list[Part]] = defaultdict(list)
    for part in parts(config):
        by_parameter[part.parameter].append(part)
    return by_parameter


def _blocks(
    config: ModelConfig, layout: Layout, mesh: Mesh, parameter: str, its_parts: Sequence[Part]
) -> Iterator[Block]:
    rule = rule_of(parameter)
    shapes = hf_shapes(config)
    tp, tp_rank = layout.tp, mesh.index["tp"]
    ep = mesh.group("ep")
    experts = range(config.num_experts * ep.rank // ep.size, config.num_experts * (ep.rank + 1) // ep.size)
    row: dict[int | None, int] = defaultdict(int)
    for part in its_parts:
        if part.expert is not None and part.expert not in experts:
            continue
        local_expert = None if part.expert is None else part.expert - experts[0]
        shape = shapes[part.name]
        start = [0] * len(shape)
        holders: str | None = None
        copies, is_sum = 1, False
        if rule.cut == "rows":
            copies = layout.key_copies(config) if ".k_proj." in part.name or ".v_proj." in part.name else 1
            if copies > 1:
                holders, is_sum = "keys", True
            first, last = _cut_rows(shape[0], tp, tp_rank, copies)
            start[0], shape = first, (last - first, *shape[1:])
        elif rule.cut == "columns":
            width = shape[1] // tp
            start[1], shape = tp_rank * width, (shape[0], width)
        elif tp > 1:
            holders, copies = "tp", tp
            is_sum = rule.gradient == "partial" or (rule.gradient == "sequence" and layout.sequence_sliced)
        yield Block(
            part.name,
            parameter,
            tuple(start),
            shape,
            row[local_expert],
            local_expert,
            holders,
            copies,
            is_sum,
        )
        row[local_expert] += shape[0]


def _cut_rows(rows: int, tp: int, rank: int, copies: int) -> tuple[int, int]:
    """First and last row of a rank; `copies` neighbours share theirs."""
    if copies > 1:
        size = rows // (tp // copies)
        return rank // copies * size, (rank // copies + 1) * size
    bounds = even_bounds(rows, tp)
    return bounds[rank], bounds[rank + 1]


def _local_shape(full: tuple[int, ...], blocks: list[Block]) -> tuple[int, ...]:
    if len(full) == 3:
        experts = 1 + max(b.expert for b in blocks if b.expert is not None)
        rows = sum(b.shape[0] for b in blocks if b.expert == 0)
        return (experts, rows, blocks[0].shape[1])
    return (sum(b.shape[0] for b in blocks), *blocks[0].shape[1:])
