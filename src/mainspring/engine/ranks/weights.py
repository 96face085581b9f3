"""A rank's weights: read from the checkpoint by slices, or drawn; replaced by new ones; summed up over all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mainspring.engine.random_weights import draw
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.checkpoint import stored_tensor
from mainspring.model.checksum import digest_of_sums, sum_of_bits
from mainspring.model.decoder import Decoder
from mainspring.ops import Policy
from mainspring.parallel.checkpoint import check_names
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.placement import Block, hf_shapes


def load_shard(
    directory: str | Path,
    layout: Layout,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    policy: Policy,
) -> ParallelDecoder:
    """The rank's part of a checkpoint; of the mapped files only its own rectangles are touched.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; ConfigError: the layout does not fit.
    """
    model = _unfilled(directory, layout, mesh, device, dtype, policy)
    config = model.config
    reader = CheckpointReader(directory)
    shapes = hf_shapes(config)
    check_names(reader, shapes, tied=config.tie_word_embeddings)
    with torch.no_grad():
        for _, block, held in _blocks(model, dict(model.named_parameters())):
            held.copy_(_rectangle(stored_tensor(reader.entry(block.name), shapes[block.name]), block))
    return model.eval()


def draw_shard(
    directory: str | Path,
    layout: Layout,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    policy: Policy,
) -> ParallelDecoder:
    """The rank's part of a model with random weights, of which the directory holds config.json alone.

    Each block is drawn by its own place, so ranks that hold the same one hold the same numbers.
    Raises ConfigError: the layout does not fit.
    """
    model = _unfilled(directory, layout, mesh, device, dtype, policy)
    with torch.no_grad():
        for parameter, block, held in _blocks(model, dict(model.named_parameters())):
            place = zlib.crc32(f"{block.name} {block.start}".encode())
            draw(held, parameter, torch.Generator(device).manual_seed(place))
    return model.eval()


def _unfilled(
    directory: str | Path,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    policy: Policy,
) -> ParallelDecoder:
    config = ModelConfig.from_file(Path(directory) / "config.json")
    return parallelize(
        Decoder(config, policy=policy, device="meta", dtype=dtype), layout, mesh, device=device
    )


@torch.no_grad()
def copy_weight(model: ParallelDecoder, parameters: Mapping[str, Tensor], name: str, whole: Tensor) -> None:
    """Replaces what the rank holds of Hugging Face's tensor `name`, given whole. parameters: as the placement names
    them."""
    for _, block, held in _blocks(model, parameters):
        if block.name == name:
            held.copy_(_rectangle(whole, block))


@torch.no_grad()
def checksum(model: ParallelDecoder, parameters: Mapping[str, Tensor]) -> str:
    """`engine.weights.weights_checksum` of the whole model, from the ranks' parts; a collective call."""
    shapes = hf_shapes(model.config)
    places = {name: place for place, name in enumerate(sorted(shapes))}
    sums = torch.zeros(len(shapes), dtype=torch.int64, device=model.device)
    for _, block, held in _blocks(model, parameters):
        if _counts(model, block):
            whole = shapes[block.name]
            width = whole[1] if len(whole) > 1 else 1
            column = block.start[1] if len(whole) > 1 else 0
            sums[places[block.name]] += sum_of_bits(held, first=block.start[0] * width + column, width=width)
    all_reduce(sums, model.mesh.group("world"))
    return digest_of_sums(
        (name, shapes[name], model.dtype, total) for name, total in zip(places, sums.tolist(), strict=True)
    )


def _blocks(model: ParallelDecoder, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Block, Tensor]]:
    """Each rectangle that the rank holds, as (parameter, block, a view of the parameter)."""
    for parameter, blocks in model.placement.blocks.items():
        for block in blocks:
            yield parameter, block, block.view(parameters[parameter])


def _counts(model: ParallelDecoder, block: Block) -> bool:
    """Of several ranks that hold the block, one counts it."""
    mesh = model.mesh
    if block.holders is not None and mesh.group(block.holders).rank:
        return False
    if block.expert is None and mesh.group("dp").rank:
        return False
    return block.parameter != "embedding" or mesh.group("tied").rank == 0


def _rectangle(tensor: Tensor, block: Block) -> Tensor:
    for dim, (start, size) in enumerate(zip(block.start, block.shape, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
